"""Why does a prefix token matter: because it is late, rare, or surprising?

The three are entangled: rare tokens are surprising, and surprise falls along the prefix. Least
squares of the EM drop on all three gives the effect of each with the others held fixed,

    y[p, i] - mean_i y[p]  ~=  sum over causes c of  b[c] * (x[p, i, c] - mean_i x[p, c]) / s[c],

for paragraph p and position i, with y the EM drop, x the causes and s[c] the standard deviation of
a centred cause. Centring within the paragraph is the same as one dummy variable per paragraph: a
paragraph that is easily disturbed as a whole tells nothing about its tokens. Intervals come from
resampling independent groups of paragraphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import at_least
from memcircuits.base.statistics import (
    bootstrap_interval,
    bootstrap_means,
    group_means,
    interval,
)
from memcircuits.data.unigrams import UnigramTable

if TYPE_CHECKING:
    import pandas as pd


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval over independent groups; NaN if there is one."""

    mean: float
    low: float
    high: float


class Samples(NamedTuple):
    """What the regression explains and by what: one row per paragraph.

    Attributes:
        em_drop: EM lost by replacing each token, tokens, [paragraph, pos].
        prefix: ids of the prefix, [paragraph, pos].
        surprisal: of each token, nats, [paragraph, pos].
        groups: number of each paragraph's independent group; None: each is its own.
    """

    em_drop: Float[Tensor, "paragraph pos"]
    prefix: Int[Tensor, "paragraph pos"]
    surprisal: Float[Tensor, "paragraph pos"]
    groups: Int[Tensor, " paragraph"] | None


def mean_with_interval(
    samples: Float[Tensor, " paragraph"],
    groups: Int[Tensor, " paragraph"] | None,
    resamples: int,
    seed: int,
) -> Interval:
    """Mean over groups of paragraphs with its bootstrap interval."""
    at_least("resamples", resamples, 1)
    means = group_means(samples, groups)
    low, high = bootstrap_interval(means, seed=seed, draws=resamples).tolist()
    return Interval(float(means.mean()), low, high)


def causes_of_em_drop(
    samples: Samples, unigrams: UnigramTable, resamples: int, seed: int
) -> pd.DataFrame:
    """Regression and rank correlations of the EM drop; columns as in `Perturbation.causes`.

    The first position is left out: nothing precedes it, so it has no surprisal.
    """
    import pandas as pd

    em_drop, prefix, surprisal, groups = samples
    n, length = prefix.shape
    causes = {
        "position": torch.arange(length, dtype=torch.float32).expand(n, length),
        "rarity": -unigrams.log_prob[prefix],
        "surprisal": surprisal,
    }
    x = torch.stack([cause[:, 1:] for cause in causes.values()], -1).double()
    y = em_drop[:, 1:].double()
    coefficients, resampled = least_squares(x, y, groups, resamples, seed)
    low, high = interval(resampled)
    rows = []
    for i, name in enumerate(causes):
        correlations = rank_correlations(x[..., i], y).nan_to_num(0.0)
        spearman = mean_with_interval(correlations[:, 0], groups, resamples, seed)
        rows.append(
            {
                "cause": name,
                "coefficient": float(coefficients[i]),
                "ci_low": float(low[i]),
                "ci_high": float(high[i]),
                "spearman": spearman.mean,
                "spearman_low": spearman.low,
                "spearman_high": spearman.high,
                "kendall": float(group_means(correlations[:, 1], groups).mean()),
            }
        )
    return pd.DataFrame(rows)


def least_squares(
    x: Float[Tensor, "paragraph pos cause"],
    y: Float[Tensor, "paragraph pos"],
    groups: Int[Tensor, " paragraph"] | None,
    resamples: int,
    seed: int,
) -> tuple[Float[Tensor, " cause"], Float[Tensor, "resample cause"]]:
    """Coefficients of the centred, standardised causes, and those of resampled groups.

    The solution (X'X)^-1 X'y depends on the data only through X'X and X'y, which are sums over
    paragraphs. So each paragraph is reduced to its own X'X and X'y once (k * k + k numbers), these
    are averaged within groups, and a bootstrap resample is a weighted mean of the groups':
    `resamples` regressions cost one matrix product and small solves. Means serve as well as sums:
    the factor cancels. The pseudo-inverse gives a constant cause the coefficient 0. One group gives
    no resampled coefficients (NaN).
    """
    x = x - x.mean(1, keepdim=True)
    y = y - y.mean(1, keepdim=True)
    spread = x.flatten(0, 1).std(0)
    x = x / spread.where(spread > 0, 1.0)
    k = x.shape[-1]
    products = torch.cat([(x.mT @ x).flatten(1), (x.mT @ y[..., None]).flatten(1)], 1)
    products = group_means(products, groups)

    def solve(sums: Tensor) -> Tensor:
        squares, cross = sums[..., : k * k].unflatten(-1, (k, k)), sums[..., k * k :, None]
        return (torch.linalg.pinv(squares, hermitian=True) @ cross)[..., 0]

    generator = torch.Generator().manual_seed(seed)
    resampled = bootstrap_means(products, resamples, generator).double()
    coefficients = solve(products.mean(0))
    if len(products) < 2:
        return coefficients, torch.full((resamples, k), torch.nan, dtype=coefficients.dtype)
    return coefficients, solve(resampled)


def rank_correlations(
    x: Float[Tensor, "paragraph pos"], y: Float[Tensor, "paragraph pos"]
) -> Float[Tensor, "paragraph 2"]:
    """Spearman's rho and Kendall's tau-b within each paragraph; NaN where one is constant."""
    from scipy.stats import kendalltau, spearmanr

    correlations = torch.full((len(x), 2), torch.nan)
    for i, (a, b) in enumerate(zip(x.numpy(), y.numpy(), strict=True)):
        if a.min() < a.max() and b.min() < b.max():
            correlations[i] = torch.tensor([spearmanr(a, b).statistic, kendalltau(a, b).statistic])
    return correlations
