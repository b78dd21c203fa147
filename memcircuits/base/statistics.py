"""Means, intervals and p-values over independent groups of paragraphs.

Tokens of one paragraph are not independent, nor are copies of a paragraph or windows of one
document (`memcircuits.data.groups`). The unit is therefore the group: paragraphs are first averaged
within their group (`group_means`), and the groups are what is averaged, resampled, permuted and
split. A paragraph that is given twenty times counts once, and each document counts once, however
many windows it has. This is the analysis of cluster summaries (Donner and Klar, Design and Analysis
of Cluster Randomization Trials, 2000), which holds for any dependence within groups. Where every
paragraph is a group of its own, it is the analysis of paragraphs.

Intervals are percentile bootstrap intervals of 95 %, from `DRAWS` resamples unless the caller says
otherwise; one group has none (NaN). Resampling is written as one matrix product (weights of the
groups times samples), so that thousands of means of all heads take milliseconds;
`scipy.stats.bootstrap` gives the same intervals more slowly. p-values come from permuted labels and
are corrected for testing many heads by the procedure of Benjamini and Hochberg.

A paragraph with a number that is not finite (an overflow in half precision) enters no mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DRAWS = 2000
"""Default number of resamples."""

FEW_GROUPS = 5
"""Percentile intervals of fewer groups are too narrow, and results say so."""

LEVELS = torch.tensor([0.025, 0.975])
"""Quantiles that bound the central 95 %."""


def finite_rows(samples: Float[Tensor, "paragraph *value"]) -> Bool[Tensor, " paragraph"]:
    """Which paragraphs have only finite numbers."""
    return samples.flatten(1).isfinite().all(1)


def finite_mean(
    samples: Float[Tensor, "paragraph *value"], groups: Int[Tensor, " paragraph"] | None = None
) -> Float[Tensor, "*value"]:
    """Mean over the groups of the paragraphs with only finite numbers; NaN if there are none."""
    rows = finite_rows(samples)
    if rows.all():
        return group_means(samples, groups).mean(0)
    return group_means(samples[rows], None if groups is None else groups[rows]).mean(0)


def left_out(finite: Bool[Tensor, " paragraph"]) -> tuple[str, ...]:
    """A note on how many paragraphs enter no mean; none if all do."""
    n = int((~finite).sum())
    if not n:
        return ()
    return (f"{n} of {len(finite)} paragraphs had non-finite numbers and were left out",)


def group_means(
    samples: Float[Tensor, "paragraph *value"], groups: Int[Tensor, " paragraph"] | None
) -> Float[Tensor, "group *value"]:
    """Mean of each group over its paragraphs, in the order of the groups' numbers.

    Args:
        samples: one value, or an array of them, per paragraph.
        groups: number of each paragraph's group (`Paragraphs.groups`); None: each is its own.
    """
    if groups is None or count_groups(groups) == len(groups):
        return samples
    _, position, sizes = groups.unique(return_inverse=True, return_counts=True)
    values = samples if samples.is_floating_point() else samples.float()
    sums = values.new_zeros(len(sizes), *values.shape[1:]).index_add_(0, position, values)
    return sums / sizes.to(values.dtype).view(-1, *[1] * (values.ndim - 1))


def turns_in_groups(
    groups: Int[Tensor, " paragraph"],
) -> tuple[Int[Tensor, " paragraph"], Int[Tensor, " paragraph"]]:
    """How many earlier paragraphs each one's group has, and how many paragraphs in all."""
    n_before: Counter[int] = Counter()
    turns = []
    for group in groups.tolist():
        turns.append(n_before[group])
        n_before[group] += 1
    sizes = [n_before[group] for group in groups.tolist()]
    return torch.tensor(turns), torch.tensor(sizes)


def count_groups(groups: Int[Tensor, " paragraph"]) -> int:
    """Number of different groups."""
    return len(groups.unique())


def group_notes(groups_of: Mapping[str, Int[Tensor, " paragraph"]]) -> tuple[str, ...]:
    """Notes on how many independent groups there are; none if each of many paragraphs is its own.

    Args:
        groups_of: set, such as `memorized`, -> number of each paragraph's group.
    """
    notes = []
    for name, groups in groups_of.items():
        n, n_groups = len(groups), count_groups(groups)
        if n_groups < n:
            notes.append(
                f"{n} {name} paragraphs are {n_groups} independent group{'s' * (n_groups > 1)}: "
                "copies, near copies and parts of one document count once together."
            )
        if n_groups == 1:
            notes.append(f"One independent group of {name} paragraphs: there is no interval.")
        elif n_groups < FEW_GROUPS:
            notes.append(
                f"{n_groups} independent groups of {name} paragraphs: intervals from fewer than "
                f"{FEW_GROUPS} are too narrow."
            )
    return tuple(notes)


def bootstrap_means(
    samples: Float[Tensor, "group *value"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draw *value"]:
    """Means of `draws` resamples of the groups with replacement."""
    n = len(samples)
    resamples = torch.randint(n, (draws, n), generator=generator)
    # How often each group is in each resample, as a share: means are then one product.
    weights = torch.zeros(draws, n).scatter_add_(1, resamples, torch.ones(draws, n)) / n
    return (weights @ samples.reshape(n, -1).float()).view(draws, *samples.shape[1:])


def interval(resampled: Float[Tensor, "draw *value"]) -> Float[Tensor, "bound *value"]:
    """Lower and upper bound of the central 95 % of resampled values."""
    return torch.quantile(resampled, LEVELS.to(resampled.dtype), dim=0)


def bootstrap_interval(
    samples: Float[Tensor, "paragraph *value"],
    groups: Int[Tensor, " paragraph"] | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Float[Tensor, "bound *value"]:
    """95 % percentile bootstrap interval of the mean over groups; NaN if there is only one."""
    means = group_means(samples, groups)
    bounds = interval(bootstrap_means(means, draws, torch.Generator().manual_seed(seed)))
    return bounds if len(means) > 1 else torch.full_like(bounds, torch.nan)


def permuted_differences(
    first: Float[Tensor, "group *value"],
    second: Float[Tensor, "other *value"],
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "draw *value"]:
    """mean(first) - mean(second) under `draws` random relabellings of the pooled groups."""
    pooled = torch.cat([first, second]).float()
    n, n_first = len(pooled), len(first)
    order = torch.rand(draws, n, generator=generator).argsort(-1)
    # The first of each random order count as `first`, the others as `second`.
    weights = torch.full((draws, n), -1.0 / (n - n_first))
    weights.scatter_(1, order[:, :n_first], 1.0 / n_first)
    return (weights @ pooled.reshape(n, -1)).view(draws, *pooled.shape[1:])


def permutation_p_value(
    difference: Float[Tensor, "*value"], permuted: Float[Tensor, "draw *value"]
) -> Float[Tensor, "*value"]:
    """One-sided p-value: how often is the permuted difference at least the observed one?

    With few groups a relabelling is often the observed one. Its difference is then a sum of the
    same numbers in another order, which differs by rounding, and must count as equal.
    """
    rounding = 1e-5 * permuted.abs().amax(0)
    return (1 + (permuted >= difference - rounding).sum(0)) / (1 + len(permuted))


def smallest_p_value(n_first: int, n_second: int) -> float:
    """The smallest possible p-value, given the numbers of groups: 1 / number of labellings."""
    return 1 / math.comb(n_first + n_second, n_first)


def benjamini_hochberg(p: Float[Tensor, "*value"]) -> Float[Tensor, "*value"]:
    """Adjusted p-values (q-values) of the Benjamini-Hochberg procedure."""
    from scipy.stats import false_discovery_control

    q = false_discovery_control(p.double().flatten().numpy(), method="bh")
    return torch.as_tensor(q, dtype=torch.float32).view(p.shape)
