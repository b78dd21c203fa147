"""Means, intervals and rows of a finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.base.statistics import bootstrap_means

RESAMPLES = 2000
FEWEST = 5  # paragraphs, pairs or edits that have an interval
FOLDS = 5  # of the jackknife
Value = tuple[float, float | None, float | None]


def mean(samples: Tensor) -> Value:
    """Mean over paragraphs with its bootstrap interval; none from fewer than `FEWEST`."""
    samples = samples.float()[samples.isfinite()]
    if len(samples) < FEWEST:
        return float(samples.mean()), None, None
    draws = bootstrap_means(samples, RESAMPLES, torch.Generator().manual_seed(0))
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return float(samples.mean()), low, high


def agreeing(each: Sequence[mc.Head], best: mc.Head) -> Value:
    """How many paragraphs have `best` for their own best head, per cent."""
    return mean(torch.tensor([100.0 * (head == best) for head in each]))


def resampled(rows: Tensor, statistic: Callable[[Tensor], float]) -> Value:
    """A statistic of rows with its bootstrap interval, for what is no mean."""
    if len(rows) < FEWEST:
        return statistic(rows), None, None
    generator, n = torch.Generator().manual_seed(0), len(rows)
    chosen = torch.randint(n, (200, n), generator=generator)
    draws = torch.tensor([statistic(rows[draw]) for draw in chosen])
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return statistic(rows), low, high


def rank_correlation(rows: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(rows[:, 0].numpy(), rows[:, 1].numpy()).statistic)


def split(paragraphs: mc.Paragraphs) -> list[mc.Paragraphs]:
    """At most `FOLDS` parts of about the same size."""
    folds = min(FOLDS, len(paragraphs))
    return [paragraphs[list(range(i, len(paragraphs), folds))] for i in range(folds)]


def intervals(whole: Sequence[float], rest: Sequence[Sequence[float]]) -> list[Value]:
    """Numbers with Student's intervals from their values without each part (grouped jackknife).

    For smooth functions of means, such as a share; the jackknife of a maximum is inconsistent.
    """
    from scipy.stats import t

    k = len(rest)
    if k < FEWEST:
        return [(value, None, None) for value in whole]
    parts = torch.tensor(rest, dtype=torch.float64)
    errors = ((k - 1) / k * (parts - parts.mean(0)).square().sum(0)).sqrt()
    widths = (float(t.ppf(0.975, k - 1)) * errors).tolist()
    return [
        (value, value - width, value + width) for value, width in zip(whole, widths, strict=True)
    ]


def lower_half(layers: Tensor) -> float:
    """Share of the lower half of the layers, per cent."""
    return 100 * float(layers[: len(layers) // 2].sum() / layers.sum())


def top_head(values: Tensor) -> mc.Head:
    """The head with the largest value; NaN is no candidate."""
    flat = values.nan_to_num(nan=-torch.inf).flatten()
    layer, head = divmod(int(flat.argmax()), values.shape[1])
    return mc.Head(layer, head)


def per_head(samples: Any, row: int, n_heads: int) -> Tensor:
    """Largest value of one paragraph over a head's four matrices, [layer, head]."""
    parts = [samples[name][row] for name in ("W_Q", "W_K", "W_V", "W_O")]
    return torch.stack([v.repeat_interleave(n_heads // v.shape[1], 1) for v in parts]).amax(0)
