"""P-values of many differences of means at once, from permuted labels.

The statistic is Welch's t, so that sets of different variance and size are compared fairly: a
permuted *difference* is not, where the smaller set varies more (Janssen 1997, Chung and Romano
2013). With a dozen groups and unequal variances not even permuted t is fair in the far tail; a
p-value is therefore never smaller than that of Welch's t-test. A set of one group has no variance,
and then the difference itself is permuted.

A p-value from D permutations cannot be below 1 / (D + 1). To survive the correction for m tests, a
single component must be able to fall below alpha / m, with room for chance: `PER_TEST * m / alpha`
permutations are drawn. Where these would be more than `MAX_PERMUTATIONS`, the tail of the permuted
statistics is fitted by a generalized Pareto distribution (Knijnenburg et al. 2009, Bioinformatics
25, i161; moments weighted by probability, Hosking and Wallis 1987), and the result says so. Tails
that end are taken as exponential, which makes p-values larger, not smaller.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.statistics import smallest_p_value

ALPHA = 0.05
"""The error rate that the number of permutations is made for."""

PER_TEST = 20
"""Permutations for each test and unit of 1 / alpha."""

MAX_PERMUTATIONS = 2**17
"""Maximum number of permutations; where more are needed, the tail is fitted."""

_CHUNK = 4096  # permutations held at once
_TAIL = 500  # permuted statistics that the tail is fitted to
_FEW = 10  # fewer permuted statistics beyond the observed one say little: there the fit is used
_ROUNDING = 1e-9


class PermutationTest(NamedTuple):
    """The outcome of `permutation_test`.

    Attributes:
        p_value: one-sided: is the mean of the first set larger?
        permutations: how many were drawn.
        fitted: which p-values come from a fitted tail.
    """

    p_value: Float[Tensor, " value"]
    permutations: int
    fitted: Bool[Tensor, " value"]


def permutations_needed(n_tests: int) -> int:
    """Number of permutations with which one of `n_tests` tests can be significant."""
    return math.ceil(PER_TEST * n_tests / ALPHA)


def permutation_test(
    first: Float[Tensor, "group value"],
    second: Float[Tensor, "other value"],
    n_tests: int,
    generator: torch.Generator,
    *,
    at_least: int = 0,
) -> PermutationTest:
    """Is the mean of `first` larger than that of `second`? One p-value for each column.

    Args:
        first: one set of independent groups.
        second: the other.
        n_tests: number of tests that the p-values will be corrected for.
        generator: draws the permutations, the same ones for all columns.
        at_least: minimum number of permutations.
    """
    pooled = torch.cat([first, second]).double()
    pooled = pooled - pooled.mean(0)
    n, n_first = len(pooled), len(first)
    needed = max(at_least, permutations_needed(n_tests))
    n_permutations = min(needed, max(at_least, MAX_PERMUTATIONS))
    observed = _statistic(pooled, (torch.arange(n) < n_first)[None])[0]
    reached = observed - _ROUNDING * observed.abs().clamp_min(1)
    n_beyond = torch.zeros(pooled.shape[1], dtype=torch.long)
    tail = torch.empty(0, pooled.shape[1], dtype=pooled.dtype)
    for start in range(0, n_permutations, _CHUNK):
        size = min(_CHUNK, n_permutations - start)
        order = torch.rand(size, n, generator=generator, dtype=torch.float64)
        inside = order <= order.kthvalue(n_first, dim=1, keepdim=True).values
        permuted = _statistic(pooled, inside)
        n_beyond += (permuted >= reached).sum(0)
        if n_permutations < needed:
            tail = torch.cat([tail, permuted])
            tail = tail.topk(min(_TAIL, len(tail)), dim=0).values
    p_value = (1 + n_beyond) / (1 + n_permutations)
    fitted = (n_beyond < _FEW) & (n_permutations < needed)
    if fitted.any():
        p_fitted = len(tail) / n_permutations * _tail_probability(tail, observed)
        p_fitted = p_fitted.clamp_min(smallest_p_value(n_first, n - n_first))
        p_value = torch.where(fitted, p_fitted, p_value)
    p_value = torch.maximum(p_value, _welch(pooled[:n_first], pooled[n_first:]))
    return PermutationTest(p_value.float(), n_permutations, fitted)


def _statistic(
    pooled: Float[Tensor, "group value"], inside: Bool[Tensor, "draw group"]
) -> Float[Tensor, "draw value"]:
    """Welch's t of the groups inside against those outside; the difference if one is alone."""
    n_inside = int(inside[0].sum())
    sizes = n_inside, len(pooled) - n_inside
    means, variances = [], []
    for chosen, size in zip((inside, ~inside), sizes, strict=True):
        weights = chosen.to(pooled.dtype) / size
        mean = weights @ pooled
        means.append(mean)
        variances.append((weights @ pooled.square() - mean.square()).clamp_min(0))
    difference = means[0] - means[1]
    if min(sizes) < 2:
        return difference
    error = variances[0] / (sizes[0] - 1) + variances[1] / (sizes[1] - 1)
    # What varies by rounding alone does not vary: its t is 0.
    scale = pooled.square().mean(0)
    return torch.where(error > 1e-12 * scale, difference / error.sqrt(), 0.0 * difference)


def _welch(
    first: Float[Tensor, "group value"], second: Float[Tensor, "other value"]
) -> Float[Tensor, " value"]:
    """One-sided p-values of Welch's t-test; 0 where a set is alone or nothing varies."""
    from scipy.stats import ttest_ind

    if min(len(first), len(second)) < 2:
        return torch.zeros(first.shape[1], dtype=torch.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        test = ttest_ind(first.numpy(), second.numpy(), equal_var=False, alternative="greater")
    return torch.as_tensor(test.pvalue).nan_to_num(0.0)


def _tail_probability(
    tail: Float[Tensor, "rank value"], observed: Float[Tensor, " value"]
) -> Float[Tensor, " value"]:
    """Probability of exceeding `observed`, for a statistic that exceeds the smallest of `tail`."""
    threshold = tail[-1]
    excess = (tail - threshold).flip(0)  # ascending
    n = len(excess)
    weights = 1 - (torch.arange(1, n + 1, dtype=excess.dtype) - 0.35) / n
    mean, weighted = excess.mean(0), (weights[:, None] * excess).mean(0)
    denominator = (mean - 2 * weighted).clamp_min(1e-300)
    shape = (2 - mean / denominator).clamp(0, 0.9)
    scale = torch.where(shape > 0, 2 * mean * weighted / denominator, mean).clamp_min(1e-300)
    beyond = (observed - threshold).clamp_min(0) / scale
    pareto = (1 + shape * beyond).log() / shape.clamp_min(1e-12)
    return torch.exp(-torch.where(shape > 1e-6, pareto, beyond))
