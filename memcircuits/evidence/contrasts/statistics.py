"""Differences between two sets of paragraphs, with intervals and permuted labels.

Most features are numbers of one paragraph. Two depend on the whole set, and are computed anew for
every permutation of the labels:

* *within-set cosine*: mean cosine of a hidden state with those of the other members of its set;
* *direction*: projection of a hidden state on the difference of the two sets' means, each mean
  taken without the paragraph itself. Its AUC is that of the leave-one-out difference of means.

Both follow from the Gram matrix of the hidden states alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.statistics import (
    benjamini_hochberg,
    bootstrap_means,
    interval,
    permuted_differences,
)

_AT_ONCE = 50  # permutations whose scores are in memory together


@dataclass(frozen=True)
class SetFeatures:
    """Features of hidden states that depend on the whole set.

    Attributes:
        cosine: mean cosine with the other members of the set, [unit, state].
        direction: leave-one-out projection on the difference of means, [unit, state].
    """

    cosine: Float[Tensor, "unit state"]
    direction: Float[Tensor, "unit state"]


class Gram:
    """Inner products of the hidden states of both sets together.

    Args:
        states: hidden states of memorized units, then of controls, [unit, state, d_model].
    """

    def __init__(self, states: Float[Tensor, "unit state d_model"]) -> None:
        by_state = states.double().transpose(0, 1)
        self.products = by_state @ by_state.transpose(1, 2)  # [state, unit, other]
        length = by_state.norm(dim=-1).clamp_min(1e-30)
        self.cosines = self.products / (length[:, :, None] * length[:, None, :])

    def features(self, is_first: Bool[Tensor, "draw unit"]) -> SetFeatures:
        """Features under labels; of several draws of labels, [draw, unit, state]."""
        first = is_first.double()
        in_first, in_second = first, 1 - first
        n_first, n_second = in_first.sum(-1), in_second.sum(-1)

        def mean_without_self(matrix: Tensor, members: Tensor) -> Tensor:
            """Mean over the members other than the unit itself, [draw, unit, state]."""
            sums = torch.einsum("snm,dm->dns", matrix, members)
            own = members[..., None] * torch.diagonal(matrix, dim1=1, dim2=2).T
            count = members.sum(-1)[:, None] - members
            return (sums - own) / count.clamp_min(1)[..., None]

        to_first = mean_without_self(self.products, in_first)
        to_second = mean_without_self(self.products, in_second)
        cosine_first = mean_without_self(self.cosines, in_first)
        cosine_second = mean_without_self(self.cosines, in_second)
        assert (n_first > 1).all()
        assert (n_second > 1).all()
        cosine = torch.where(is_first[..., None], cosine_first, cosine_second)
        return SetFeatures(cosine.float(), (to_first - to_second).float())


def auc(values: Float[Tensor, "*draw unit"], is_first: Bool[Tensor, "*draw unit"]) -> Tensor:
    """Probability that a value of the first set is larger than one of the second, ties count half.

    Args:
        values: [..., unit].
        is_first: the first set, likewise.
    """
    # Twice the mean rank of each value: ranks from below and above differ where there are ties.
    ordered = values.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    twice_rank = (below + not_above + 1).double()
    n_first = is_first.sum(-1).double()
    n_second = values.shape[-1] - n_first
    rank_sum = (twice_rank * is_first).sum(-1) / 2
    return ((rank_sum - n_first * (n_first + 1) / 2) / (n_first * n_second)).float()


def compare(
    first: Float[Tensor, "unit feature"],
    second: Float[Tensor, "other feature"],
    draws: int,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, " feature"]]:
    """Means, difference, interval, AUC and p-value of features of single units."""
    resampled = bootstrap_means(first, draws, generator) - bootstrap_means(second, draws, generator)
    low, high = interval(resampled)
    pooled = torch.cat([first, second]).T
    is_first = (torch.arange(pooled.shape[1]) < len(first)).expand(pooled.shape)
    difference = first.mean(0) - second.mean(0)
    null = permuted_differences(first, second, draws, generator)
    return {
        "memorized": first.mean(0),
        "control": second.mean(0),
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "auc": auc(pooled, is_first),
        "p_value": _p_value(difference.abs(), null.abs()),
    }


def compare_sets(
    gram: Gram, n_first: int, draws: int, generator: torch.Generator
) -> tuple[SetFeatures, dict[str, Tensor], dict[str, Tensor]]:
    """The features of whole sets, and the p-values of cosine and direction from permuted labels."""
    n = gram.products.shape[1]
    actual = torch.arange(n) < n_first
    own = gram.features(actual[None])
    features = SetFeatures(own.cosine[0], own.direction[0])
    null: dict[str, list[Tensor]] = {"cosine": [], "direction": []}
    order = torch.rand(draws, n, generator=generator).argsort(-1)
    for labels in (order < n_first).split(_AT_ONCE):
        permuted = gram.features(labels)
        null["cosine"].append(_difference(permuted.cosine, labels).abs())
        null["direction"].append(_auc_of_states(permuted.direction, labels))
    cosine = _difference(own.cosine, actual[None])[0].abs()
    direction = _auc_of_states(own.direction, actual[None])[0]
    return (
        features,
        {"p_value": _p_value(cosine, torch.cat(null["cosine"]))},
        {"p_value": _p_value(direction, torch.cat(null["direction"])), "auc": direction},
    )


def with_q_values(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics and the q-value of every p-value that is a number."""
    q = torch.full_like(statistics["p_value"], torch.nan)
    defined = statistics["p_value"].isfinite()
    if defined.any():
        q[defined] = benjamini_hochberg(statistics["p_value"][defined])
    return statistics | {"q_value": q}


def _difference(
    values: Float[Tensor, "draw unit state"], labels: Bool[Tensor, "draw unit"]
) -> Float[Tensor, "draw state"]:
    """Mean of the first set minus mean of the second."""
    first = labels[..., None].float()
    second = 1 - first
    return (values * first).sum(1) / first.sum(1) - (values * second).sum(1) / second.sum(1)


def _auc_of_states(
    values: Float[Tensor, "draw unit state"], labels: Bool[Tensor, "draw unit"]
) -> Float[Tensor, "draw state"]:
    by_state = values.transpose(1, 2)
    return auc(by_state, labels[:, None].expand(by_state.shape))


def _p_value(
    statistic: Float[Tensor, " feature"], null: Float[Tensor, "draw feature"]
) -> Float[Tensor, " feature"]:
    """Share of permutations that reach the statistic, counting the labels as they are as one.

    1 where the statistic is the same number for all labels, as where a feature is constant.
    """
    slack = 1e-6 * null.abs().amax(0)
    p = (1 + (null >= statistic - slack).sum(0)) / (1 + len(null))
    constant = (null.amax(0) - null.amin(0)) <= slack * 1e-3
    return torch.where(constant, torch.ones_like(p), p)
