"""How much more each head matters in one model than in the other, on the same paragraphs.

The score of a head is its ablation effect on memorized paragraphs minus that on controls
(`memcircuits.evidence.find_components`). Its change from model a to model b is the mean over
memorized paragraphs of the change of the effect, minus the same mean over controls. Both models are
measured on the same paragraphs, so each independent group gives one change, and what makes a
paragraph sensitive to the ablation of any head cancels. The interval resamples the groups; the
two-sided p-value shuffles the labels memorized and control of their changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import (
    bootstrap_means,
    finite_rows,
    group_means,
    interval,
    permutation_p_value,
    permuted_differences,
)
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.ablation import ablate_heads
from memcircuits.evidence.ranking import Ranking
from memcircuits.models.adapter import Adapter
from memcircuits.results.provenance import same_basis

SETS = ("memorized", "control")

Effects: TypeAlias = Mapping[str, Float[Tensor, "model group layer head"]]
"""Set -> effects of ablating each head in both models, nats/token, on the same groups."""


@dataclass(frozen=True)
class HeadChanges:
    """The scores of both models and how they differ.

    Attributes:
        scores: memorized minus control effect, nats/token, [model, layer, head].
        ci: 95 % interval of the change from the first to the second, [bound, layer, head].
        p_value: two-sided, [layer, head].
        n_groups: set -> number of independent groups.
        notes: what the reader must know.
    """

    scores: Float[Tensor, "model layer head"]
    ci: Float[Tensor, "bound layer head"]
    p_value: Float[Tensor, "layer head"]
    n_groups: Mapping[str, int]
    notes: tuple[str, ...] = ()


def head_changes(effects: Effects, draws: int, seed: int) -> HeadChanges:
    """Scores, and the paired change with its interval and p-value."""
    memorized, control = effects["memorized"], effects["control"]
    change_memorized, change_control = memorized[1] - memorized[0], control[1] - control[0]
    generator = torch.Generator().manual_seed(seed)
    resampled = bootstrap_means(change_memorized, draws, generator)
    resampled = resampled - bootstrap_means(change_control, draws, generator)
    null = permuted_differences(change_memorized, change_control, draws, generator)
    change = change_memorized.mean(0) - change_control.mean(0)
    n_groups = {name: effects[name].shape[1] for name in SETS}
    ci = interval(resampled)
    return HeadChanges(
        scores=memorized.mean(1) - control.mean(1),
        ci=ci if min(n_groups.values()) > 1 else torch.full_like(ci, torch.nan),
        # Heads that were not ablated in both have no effects, and claim nothing.
        p_value=permutation_p_value(change.abs(), null.abs()).where(change.isfinite(), 1.0),
        n_groups=n_groups,
    )


def effects_of_models(
    adapters: tuple[Adapter, Adapter],
    paragraphs: Mapping[str, Paragraphs],
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Effects:
    """Zero ablation of every head of both models, one effect per independent group.

    Raises:
        InputError: if no paragraph of a set has finite effects in both models.
    """
    effects = {}
    for name, group in paragraphs.items():
        nll = torch.stack(
            [
                ablate_heads(
                    adapter, group, memory_budget=memory_budget, progress=progress
                ).samples["nll"]
                for adapter in adapters
            ]
        )
        finite = finite_rows(nll.transpose(0, 1))
        if not finite.any():
            raise InputError(name, "non-finite numbers when heads are ablated", "use float32")
        groups = group.groups[finite]
        effects[name] = torch.stack([group_means(each[finite], groups) for each in nll])
    return effects


def changes_of_rankings(a: Ranking, b: Ranking, draws: int, seed: int) -> HeadChanges:
    """The change from one ranking to another, on the groups of paragraphs that both measured.

    Without groups in common, the change is the difference of the scores, without interval.

    Raises:
        InputError: if the rankings are of other shapes, bases or modes of ablation.
    """
    _check_comparable(a, b)
    shared = {name: _shared_groups(a, b, name) for name in SETS}
    sizes = {name: len(pairs) for name, pairs in shared.items()}
    if sizes["memorized"] < 1 or sizes["control"] < 2:
        scores = torch.stack([a.score, b.score])
        return HeadChanges(
            scores=scores,
            ci=torch.full((2, *a.score.shape), torch.nan),
            p_value=torch.ones_like(a.score),
            n_groups=sizes,
            notes=(
                "the rankings have too few paragraphs in common: the change is the difference of "
                "two scores of different paragraphs, without an interval",
            ),
        )
    effects = {
        name: torch.stack(
            [a.samples[name][[i for i, _ in pairs]], b.samples[name][[j for _, j in pairs]]]
        )
        for name, pairs in shared.items()
    }
    measured = head_changes(effects, draws, seed)
    notes = tuple(
        f"{sizes[name]} independent groups of {name} paragraphs are in both rankings; scores and "
        "changes are of these alone"
        for name in SETS
        if not len(a.samples[name]) == len(b.samples[name]) == sizes[name]
    )
    return HeadChanges(measured.scores, measured.ci, measured.p_value, measured.n_groups, notes)


def _shared_groups(a: Ranking, b: Ranking, name: str) -> list[tuple[int, int]]:
    """Places, in either ranking's samples, of the groups with the same paragraphs."""
    contents = [_group_contents(ranking, name) for ranking in (a, b)]
    place_in_b = {content: place for place, content in enumerate(contents[1])}
    return [
        (place, place_in_b[content])
        for place, content in enumerate(contents[0])
        if content in place_in_b
    ]


def _group_contents(ranking: Ranking, name: str) -> list[frozenset[tuple[int, ...]]]:
    """The paragraphs of each group, in the order of the samples; none where that is not known."""
    paragraphs = ranking.memorized if name == "memorized" else ranking.control
    members: dict[int, set[tuple[int, ...]]] = {}
    for group, row in zip(paragraphs.groups.tolist(), paragraphs.ids.tolist(), strict=True):
        members.setdefault(group, set()).add(tuple(row))
    contents = [frozenset(members[group]) for group in sorted(members)]
    # Groups without finite effects are not among the samples, nor is anything in older rankings.
    samples = ranking.samples.get(name, torch.empty(0))
    return contents if len(samples) == len(contents) else []


def _check_comparable(a: Ranking, b: Ranking) -> None:
    same_basis("b", a.provenance, b.provenance)
    for argument, ranking in (("a", a), ("b", b)):
        if ranking.units != ("head",):
            raise InputError(argument, f"a ranking of {ranking.units}", "compare rankings of heads")
    shapes = [tuple(ranking.score.shape) for ranking in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            "b", f"{shapes[1]} layers and heads", f"a has {shapes[0]}: heads cannot be matched"
        )
    modes = [str(ranking.provenance.options.get("mode")) for ranking in (a, b)]
    if modes[0] != modes[1]:
        raise InputError("b", f"{modes[1]} ablation", f"a is of {modes[0]}: use the same mode")
    a.memorized.check_same_bos(b.memorized, "b")


def chosen_rows(em: Int[Tensor, "model paragraph"], length: int) -> Mapping[str, Tensor]:
    """Which paragraphs the heads are measured on: recited by either model, hardly by both."""
    return {
        "memorized": (em == length).any(0).nonzero().flatten(),
        "control": (em * 5 <= length).all(0).nonzero().flatten(),
    }
