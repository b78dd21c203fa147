"""Statements that hold for many values at once: corrected p-values, and possible ranks.

An interval of one head, or its p-value, answers for that head alone. Of many heads some lie outside
their own 95 % intervals by chance, and the head with the largest estimate need not be the head with
the largest value. Both functions take draws in which all values are resampled, or permuted,
together, so that the draws hold whatever dependence there is between values.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVEL = 0.95
"""Probability with which all statements about ranks hold."""


def max_p_value(
    observed: Float[Tensor, "*value"], null: Float[Tensor, "draw *value"]
) -> Float[Tensor, "*value"]:
    """p-values of large values, corrected for all of them by the largest of each draw.

    If no value differs from the null, the probability that any p-value is at most 0.05 is at most
    0.05, for any dependence between the values. Values are standardized by the mean and standard
    deviation of the draws, the observed one among them, so that each counts alike (single-step maxT
    of Westfall and Young, Resampling-Based Multiple Testing, 1993). The smallest possible p-value
    is 1 / (draws + 1), however many values there are.

    Args:
        observed: one statistic per value; large ones speak against the null.
        null: draws of all statistics under the null, those of one draw made together.
    """
    every = torch.cat([observed[None], null]).double().flatten(1)
    standard = (every - every.mean(0)) / every.std(0).clamp_min(1e-12)
    largest = standard.amax(1)
    # The observed draw counts as one of the draws. Equal numbers may differ by rounding.
    at_least = (largest[:, None] >= standard[0] - 1e-9).double().mean(0)
    return at_least.to(observed.dtype).view(observed.shape)


def rank_intervals(
    estimate: Float[Tensor, " value"], resampled: Float[Tensor, "draw value"]
) -> Int[Tensor, "bound value"]:
    """The ranks that each value may have, 1 for the largest; all hold together at 95 %.

    Two values are in order if their difference exceeds what the largest of all standardized
    differences reaches in 95 % of the resamples. The best rank of a value is then 1 plus the number
    of values that are certainly larger, the worst the number of values that are not certainly
    smaller. Bootstrapped ranks themselves would not do: among equal values they promise an order
    that is not there (Mogstad, Romano, Shaikh and Wilhelm, Inference for Ranks, 2024).

    Args:
        estimate: the values.
        resampled: bootstrap draws of all values together.
    """
    n = len(estimate)
    centred = resampled.double() - resampled.double().mean(0)
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    variance = covariance.diagonal()
    spread = (variance[:, None] + variance - 2 * covariance).clamp_min(1e-24).sqrt()
    largest = torch.zeros(len(centred), dtype=torch.float64)
    for i in range(n - 1):
        t = (centred[:, i + 1 :] - centred[:, i : i + 1]).abs() / spread[i, i + 1 :]
        largest = torch.maximum(largest, t.amax(1))
    critical = torch.quantile(largest, LEVEL)
    # [i, j]: whether value i is certainly larger than value j.
    is_larger = (estimate.double()[:, None] - estimate.double()) / spread > critical
    return torch.stack([1 + is_larger.sum(0), n - is_larger.sum(1)])
