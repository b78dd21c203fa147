"""Metrics of one localizer in one trial: its scores against the truth.

The scores of the units are read as the output of a retrieval system, the planted units as the
relevant documents. `recall_at_1` and `recall_at_k` (k: the number of planted units, where recall
equals precision) and the reciprocal rank are those of `torchmetrics.retrieval`
(`RetrievalRecall`, `RetrievalMRR`); the AUC is that of `sklearn.metrics.roc_auc_score`, the
probability that a planted unit is scored above another one. They are computed here, in a few
lines, because neither library is a dependency, and because scores that are not finite have a
defined place: the last.
"""

from __future__ import annotations

import math
from typing import Literal, TypedDict, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.errors import InputError

Metric = Literal["recall_at_1", "recall_at_k", "mrr", "auc"]
"""A metric of a ranking of units; the best value of each is 1."""

METRICS: tuple[Metric, ...] = get_args(Metric)

_Z = 1.959964  # 97.5 % quantile of the normal distribution


class Metrics(TypedDict):
    """What `metrics` returns.

    Attributes:
        recall_at_1: 1.0 if the unit with the highest score is a planted one, else 0.0.
        recall_at_k: the fraction of the k planted units among the k highest scores.
        mrr: 1 / rank of the first planted unit.
        auc: area under the ROC curve; ties count one half.
        k: number of planted units.
        units: number of all units.
    """

    recall_at_1: float
    recall_at_k: float
    mrr: float
    auc: float
    k: int
    units: int


def metrics(scores: Float[Tensor, " unit"], truth: Bool[Tensor, " unit"]) -> Metrics:
    """Score a localizer's answer.

    Args:
        scores: one score per unit, higher for units considered more responsible.
        truth: which units were planted; at least one is, and at least one is not.

    Returns:
        Recall, reciprocal rank and AUC. Scores that are not finite rank last; of equal scores the
        first ranks first, except in the AUC, where they count one half.

    Raises:
        InputError: if no unit was planted, or all were.
    """
    from scipy.stats import rankdata

    k, n_units = int(truth.sum()), len(truth)
    if not 0 < k < n_units:
        raise InputError("truth", f"{k} of {n_units} units", "some must be true, some not")
    scores = scores.double().nan_to_num(-math.inf, -math.inf, -math.inf)
    order = scores.argsort(descending=True, stable=True)
    is_hit = truth[order]
    # The AUC is the Mann-Whitney U statistic of the planted units, as a fraction of its maximum.
    ranks = torch.as_tensor(rankdata(scores.numpy()))
    u_statistic = ranks[truth].sum() - k * (k + 1) / 2
    return {
        "recall_at_1": float(is_hit[0]),
        "recall_at_k": float(is_hit[:k].float().mean()),
        "mrr": 1 / (1 + int(is_hit.int().argmax())),
        "auc": float(u_statistic / (k * (n_units - k))),
        "k": k,
        "units": n_units,
    }


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, the mean of `n` independent numbers from 0 to 1.

    Of numbers that are not all 0 or 1, such as the shares of several groups of trials, it is
    conservative: no numbers with this mean vary more. One number has no interval (NaN).
    """
    if n < 2:
        return math.nan, math.nan
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    width = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - width), min(1.0, centre + width)
