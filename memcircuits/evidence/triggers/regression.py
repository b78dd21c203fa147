"""TODO."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import at_least
from memcircuits.core.statistics import bootstrap_interval, bootstrap_means


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval over paragraphs."""

    mean: float
    low: float
    high: float


def mean_with_interval(samples: Float[Tensor, " paragraph"], resamples: int, seed: int) -> Interval:
    """Mean over paragraphs with its bootstrap interval."""
    at_least("resamples", resamples, 1)
    low, high = bootstrap_interval(samples, seed=seed, draws=resamples).tolist()
    return Interval(float(samples.mean()), low, high)


def least_squares(
    x: Float[Tensor, "paragraph pos cause"],
    y: Float[Tensor, "paragraph pos"],
    resamples: int,
    seed: int,
) -> tuple[Float[Tensor, " cause"], Float[Tensor, "resample cause"]]:
    """Coefficients of centred, standardised causes, and of resampled paragraphs.

    Per paragraph only X'X and X'y are needed, so resampling is a weighted mean of those.
    """
    x = x - x.mean(1, keepdim=True)
    y = y - y.mean(1, keepdim=True)
    spread = x.flatten(0, 1).std(0)
    x = x / spread.where(spread > 0, 1.0)
    k = x.shape[-1]
    products = torch.cat([(x.mT @ x).flatten(1), (x.mT @ y[..., None]).flatten(1)], 1)

    def solve(sums: Tensor) -> Tensor:
        squares, cross = sums[..., : k * k].unflatten(-1, (k, k)), sums[..., k * k :, None]
        return (torch.linalg.pinv(squares, hermitian=True) @ cross)[..., 0]

    generator = torch.Generator().manual_seed(seed)
    resampled = bootstrap_means(products, resamples, generator).double()
    return solve(products.mean(0)), solve(resampled)


def rank_correlations(
    x: Float[Tensor, "paragraph pos"], y: Float[Tensor, "paragraph pos"]
) -> Float[Tensor, "paragraph 2"]:
    """Spearman's rho and Kendall's tau-b within each paragraph; NaN where one is constant."""
    from scipy.stats import kendalltau, spearmanr

    found = torch.full((len(x), 2), torch.nan)
    for i, (a, b) in enumerate(zip(x.numpy(), y.numpy(), strict=True)):
        if a.min() < a.max() and b.min() < b.max():
            found[i] = torch.tensor([spearmanr(a, b).statistic, kendalltau(a, b).statistic])
    return found
