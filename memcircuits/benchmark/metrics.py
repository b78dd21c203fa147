"""TODO."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError


def metrics(scores: Float[Tensor, " unit"], truth: Tensor) -> dict[str, float]:
    """Recall@1, recall@k, reciprocal rank and AUC of scores against a boolean truth.

    Non-finite scores rank last; ties count half in the AUC.
    """
    from scipy.stats import rankdata

    scores = scores.double().nan_to_num(-math.inf, -math.inf, -math.inf)
    k = int(truth.sum())
    if not 0 < k < len(truth):
        raise InputError("truth", f"{k} of {len(truth)} units", "some must be true, some not")
    order = scores.argsort(descending=True, stable=True)
    hits = truth[order]
    ranks = torch.as_tensor(rankdata(scores.numpy()))
    auc = (ranks[truth].sum() - k * (k + 1) / 2) / (k * (len(truth) - k))
    return {
        "recall_at_1": float(hits[0]),
        "recall_at_k": float(hits[:k].float().mean()),
        "mrr": 1 / (1 + int(hits.int().argmax())),
        "auc": float(auc),
        "k": k,
        "units": len(truth),
    }


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
