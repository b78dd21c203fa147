"""Means, intervals and p-values over paragraphs.

The unit that is resampled is always the paragraph: tokens of one paragraph are not independent.
Intervals are percentile bootstrap intervals of 95 %, from `DRAWS` resamples unless the caller says
otherwise. Resampling is written as one matrix product (weights of the paragraphs times samples), so
that thousands of means of all heads take milliseconds; `scipy.stats.bootstrap` gives the same
intervals more slowly. p-values come from permuted labels and are corrected for testing many heads
by the procedure of Benjamini and Hochberg.

A paragraph with a number that is not finite (an overflow in half precision) enters no mean.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DRAWS = 2000
"""Default number of resamples."""

LEVELS = torch.tensor([0.025, 0.975])
"""Quantiles that bound the central 95 %."""


def finite_rows(samples: Float[Tensor, "paragraph *value"]) -> Bool[Tensor, " paragraph"]:
    """Which paragraphs have only finite numbers."""
    return samples.flatten(1).isfinite().all(1)


def finite_mean(samples: Float[Tensor, "paragraph *value"]) -> Float[Tensor, "*value"]:
    """Mean over the paragraphs with only finite numbers; NaN if there are none."""
    rows = finite_rows(samples)
    return samples.mean(0) if rows.all() else samples[rows].mean(0)


def left_out(finite: Bool[Tensor, " paragraph"]) -> tuple[str, ...]:
    """A note on how many paragraphs enter no mean; none if all do."""
    n = int((~finite).sum())
    if not n:
        return ()
    return (f"{n} of {len(finite)} paragraphs had non-finite numbers and were left out",)


def bootstrap_means(
    samples: Float[Tensor, "paragraph *value"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draw *value"]:
    """Means of `draws` resamples of the paragraphs with replacement."""
    n = len(samples)
    resamples = torch.randint(n, (draws, n), generator=generator)
    # How often each paragraph is in each resample, as a share: means are then one product.
    weights = torch.zeros(draws, n).scatter_add_(1, resamples, torch.ones(draws, n)) / n
    return (weights @ samples.reshape(n, -1).float()).view(draws, *samples.shape[1:])


def interval(resampled: Float[Tensor, "draw *value"]) -> Float[Tensor, "bound *value"]:
    """Lower and upper bound of the central 95 % of resampled values."""
    return torch.quantile(resampled, LEVELS.to(resampled.dtype), dim=0)


def bootstrap_interval(
    samples: Float[Tensor, "paragraph *value"], *, seed: int = 0, draws: int = DRAWS
) -> Float[Tensor, "bound *value"]:
    """95 % percentile bootstrap interval of the mean over paragraphs."""
    return interval(bootstrap_means(samples, draws, torch.Generator().manual_seed(seed)))


def permuted_differences(
    first: Float[Tensor, "paragraph *value"],
    second: Float[Tensor, "other *value"],
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "draw *value"]:
    """mean(first) - mean(second) under `draws` random relabellings of the pooled paragraphs."""
    pooled = torch.cat([first, second]).float()
    n, n_first = len(pooled), len(first)
    order = torch.rand(draws, n, generator=generator).argsort(-1)
    # The first of each random order count as `first`, the others as `second`.
    weights = torch.full((draws, n), -1.0 / (n - n_first))
    weights.scatter_(1, order[:, :n_first], 1.0 / n_first)
    return (weights @ pooled.reshape(n, -1)).view(draws, *pooled.shape[1:])


def benjamini_hochberg(p: Float[Tensor, "*value"]) -> Float[Tensor, "*value"]:
    """Adjusted p-values (q-values) of the Benjamini-Hochberg procedure."""
    from scipy.stats import false_discovery_control

    q = false_discovery_control(p.double().flatten().numpy(), method="bh")
    return torch.as_tensor(q, dtype=torch.float32).view(p.shape)
