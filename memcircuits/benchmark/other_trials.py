"""Trials with another question than where one planting is.

* `holders_trial`: six paragraphs in six heads of one model. A method that only finds heads that
  matter for recitation in general cannot tell which head holds which paragraph.
* `null_trial`: of paragraphs that do not differ, how often does the significance test of
  `find_memorization_heads` call some head significant? At most as often as its level, if the
  test is calibrated.
* `stability_trial`: rank agreement of a localizer between two halves of a set of paragraphs that
  the model recites, and between two seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.base.permutation import permutation_test
from memcircuits.base.statistics import (
    benjamini_hochberg,
)
from memcircuits.benchmark.localizers import localize, localizers_of
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.schemas import (
    Agreement,
    Assignment,
    HoldersTrial,
    NullResult,
    NullTrial,
    StabilityTrial,
)
from memcircuits.benchmark.units import LocalizationTask
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import plant
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.find_components import find_memorization_heads
from memcircuits.evidence.ranking import SIGNIFICANCE, Ranking
from memcircuits.measure.scanning import scan
from memcircuits.models.registry import adapt

_N_HOLDERS = 6
_MIN_NULL, _MAX_NULL, _PER_SIDE = 20, 60, 20  # paragraphs of a null trial
_PER_HALF = 6  # paragraphs in each half of a stability trial


def holders_trial(pool: ParagraphPool, seed: int) -> HoldersTrial:
    """Plant six paragraphs through six heads of one model, and attribute each to a head."""
    assigned: list[Assignment] = []
    em: list[int] = []
    with contextlib.ExitStack() as plantings:
        holders, targets = _plant_holders(pool, seed, plantings)
        if len(holders) > 1:  # one holder cannot be confused with another
            paragraphs = _concatenated(targets)
            em = scan(pool.model, paragraphs, progress=False).em.tolist()
            is_recited = [tokens == paragraphs.n_continuation for tokens in em]
            for method in ("exact", "screen"):
                for i, holder in enumerate(holders):
                    if is_recited[i]:
                        ranking = _rank_against_others(pool, paragraphs, i, method, seed)
                        assigned.append(_assignment(ranking, method, holder, holders))
    return HoldersTrial(seed=seed, em=em, assigned=assigned, planted=len(holders))


def _plant_holders(
    pool: ParagraphPool, seed: int, plantings: contextlib.ExitStack
) -> tuple[list[Head], list[Paragraphs]]:
    """Plant paragraphs through random heads until six succeeded or no paragraphs remain.

    Returns:
        The heads, and the paragraph planted through each. The edits stay applied until `plantings`
        is closed.
    """
    generator = torch.Generator().manual_seed(10_000 + seed)
    heads = adapt(pool.model).heads()
    order = torch.randperm(len(heads), generator=generator).tolist()
    candidates, anchors = pool.draw(generator, 2 * _N_HOLDERS)
    holders: list[Head] = []
    targets: list[Paragraphs] = []
    for i, target in enumerate(candidates):
        if len(holders) == _N_HOLDERS:
            break
        # The paragraphs planted before must stay recited: they are among the anchors, and the
        # other anchors are few so that each of them counts.
        control = _concatenated([anchors[:_N_HOLDERS], *targets])
        with contextlib.suppress(InputError):
            planted = plant(
                pool.model,
                target,
                where=str(heads[order[i]]),
                control=control,
                steps=150,
                seed=seed,
                progress=False,
            )
            plantings.enter_context(planted.apply(pool.model))
            holders.append(planted.truth.heads[0])
            targets.append(target)
    return holders, targets


def _concatenated(groups: Sequence[Paragraphs]) -> Paragraphs:
    result = groups[0]
    for group in groups[1:]:
        result = result + group
    return result


def _rank_against_others(
    pool: ParagraphPool,
    paragraphs: Paragraphs,
    index: int,
    method: Literal["exact", "screen"],
    seed: int,
) -> Ranking:
    """Rank the heads for one of the paragraphs, with the others as controls."""
    others = [i for i in range(len(paragraphs)) if i != index]
    return find_memorization_heads(
        pool.model,
        paragraphs[index],
        control=paragraphs[others],
        unigrams=pool.unigrams,
        method=method,
        draws=200,
        seed=seed,
        progress=False,
    )


def _assignment(ranking: Ranking, method: str, holder: Head, holders: Sequence[Head]) -> Assignment:
    """The head that ranks first of all heads, and the one that ranks first of the holders."""
    among_holders = max(holders, key=lambda head: float(ranking.score[head]))
    return Assignment(
        method=method,
        holder=str(holder),
        first=str(ranking.top(1)[0]),
        among_holders=str(among_holders),
    )


def null_trial(pool: ParagraphPool, runs: int, seed: int) -> NullTrial:
    """Count how often a head is called significant between random halves of one set."""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(pool.model)
    results: dict[str, NullResult] = {}
    for name, group in (("unknown", pool.unknown), ("recited", pool.recited)):
        if group is None or len(group) < _MIN_NULL:
            continue
        chosen = group[torch.randperm(len(group), generator=generator)[:_MAX_NULL]]
        effects = Ablation(pool.model, chosen, mode="zero").effects(
            adapter.heads(), progress=False
        )[..., 0]
        n = min(_PER_SIDE, len(chosen) // 2)
        named = 0
        for _ in range(runs):
            order = torch.randperm(len(chosen), generator=generator)
            named += _any_significant(effects, order[:n], order[n : 2 * n], generator)
        results[name] = NullResult(paragraphs=len(chosen), per_side=n, named=named)
    return NullTrial.model_validate({"runs": runs, **results})


def _any_significant(
    effects: Float[Tensor, "paragraph head"],
    first: Int[Tensor, " paragraph"],
    second: Int[Tensor, " paragraph"],
    generator: torch.Generator,
) -> bool:
    """Whether a permutation test calls a head's mean effect larger in the first group."""
    a, b = effects[first], effects[second]
    p_value = permutation_test(a, b, a.shape[1], generator).p_value
    return bool((benjamini_hochberg(p_value) < SIGNIFICANCE).any())


def stability_trial(pool: ParagraphPool, seed: int) -> StabilityTrial:
    """Kendall's tau between the scores of two halves of recited paragraphs, nothing planted."""
    from scipy.stats import kendalltau

    if pool.recited is None or len(pool.recited) < 2 * _PER_HALF:
        return StabilityTrial(agreement={})
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.recited), generator=generator)
    control, _ = pool.draw(generator, _PER_HALF)
    first = pool.recited[order[:_PER_HALF]]
    second = pool.recited[order[_PER_HALF : 2 * _PER_HALF]]
    agreement = {}
    for name in localizers_of("head"):
        if name in ("oracle", "random"):
            continue
        scores, of_second, of_seed = (
            localize(
                LocalizationTask(pool.model, targets, control, pool.unigrams, task_seed), name
            ).numpy()
            for targets, task_seed in ((first, seed), (second, seed), (first, seed + 1))
        )
        agreement[name] = Agreement(
            halves=float(kendalltau(scores, of_second).statistic),
            seeds=float(kendalltau(scores, of_seed).statistic),
        )
    return StabilityTrial(agreement=agreement, per_half=_PER_HALF)
