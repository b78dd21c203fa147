"""How much more each head matters in one model than in the other, on the same paragraphs.

The score of a head is its ablation effect on memorized paragraphs minus that on controls
(`memcircuits.evidence.find_components`). Its change from model a to model b is the mean over
memorized paragraphs of the change of the effect, minus the same mean over controls. Both models are
measured on the same paragraphs, so each independent group gives one change, and what makes a
paragraph sensitive to the ablation of any head cancels. The interval resamples the groups; the
two-sided p-value shuffles the labels memorized and control of their changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
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
        InputError: if the rankings are of other shapes, bases, scores or modes of ablation.
    """
    _check_comparable(a, b)
    scores = torch.stack([a.scores.values, b.scores.values])
    shared = {name: _shared_groups(a, b, name) for name in SETS}
    n_groups = {name: len(pairs) for name, pairs in shared.items()}
    if n_groups["memorized"] < 1 or n_groups["control"] < 2:
        unknown = torch.full((2, *scores.shape[1:]), torch.nan)
        note = (
            "the rankings have too few paragraphs in common: the change is the difference of two "
            "scores of different paragraphs, without an interval"
        )
        return HeadChanges(scores, unknown, torch.ones_like(scores[0]), n_groups, (note,))
    effects = {name: _paired_effects(a, b, name, pairs) for name, pairs in shared.items()}
    measured = head_changes(effects, draws, seed)
    verified = _verified(a) & _verified(b)
    notes = [
        f"{n_groups[name]} independent groups of {name} paragraphs are in both rankings; scores "
        "and changes are of these alone"
        for name in SETS
        if not len(a.samples[name]) == len(b.samples[name]) == n_groups[name]
    ]
    if not verified.all():
        notes.append(
            f"{int((~verified).sum())} heads were only estimated in a or b and have no interval"
        )
    return HeadChanges(
        scores=measured.scores.where(verified, scores),
        ci=measured.ci.where(verified, torch.nan),
        p_value=measured.p_value.where(verified, 1.0),
        n_groups=n_groups,
        notes=tuple(notes),
    )


def _paired_effects(
    a: Ranking, b: Ranking, name: str, pairs: Sequence[tuple[int, int]]
) -> Float[Tensor, "model group layer head"]:
    """Effects of the heads in both rankings on the groups that they share."""
    places = zip(*pairs, strict=True)
    return torch.stack(
        [
            ranking.samples[name][list(rows)][:, :, ranking.grid.columns("head")]
            for ranking, rows in zip((a, b), places, strict=True)
        ]
    )


def _verified(ranking: Ranking) -> Bool[Tensor, "layer head"]:
    """Which heads were ablated exactly."""
    verified = ranking.evidence.get("verified", torch.ones_like(ranking.score))
    return verified[:, ranking.grid.columns("head")].bool()


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
    shapes = [f"{r.grid.n_layers} layers of {r.grid.n_heads} heads" for r in (a, b)]
    settings = {
        "": shapes,
        "ablation: ": [str(r.provenance.options.get("mode")) for r in (a, b)],
        "score: ": [str(r.provenance.options.get("score", "effect")) for r in (a, b)],
    }
    for setting, (of_a, of_b) in settings.items():
        if of_a != of_b:
            raise InputError("b", f"{setting}{of_b}", f"a has {of_a}: give two that agree in it")
    if settings["score: "] != ["effect", "effect"]:
        remedy = "changes are of effects: rank both with the score effect"
        raise InputError("a", f"score: {settings['score: '][0]}", remedy)
    a.memorized.check_same_bos(b.memorized, "b")


def chosen_rows(em: Int[Tensor, "model paragraph"], length: int) -> Mapping[str, Tensor]:
    """Which paragraphs the heads are measured on: recited by either model, hardly by both."""
    return {
        "memorized": (em == length).any(0).nonzero().flatten(),
        "control": (em * 5 <= length).all(0).nonzero().flatten(),
    }
