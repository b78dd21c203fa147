"""Trials with another question than where one planting is.

* `holders_trial`: six paragraphs in six heads of one model. A method that only finds heads that
  matter for recitation in general cannot tell which head holds which paragraph.
* `null_trial`: of two sets of which none is memorized, or both are, how often does the significance
  test of `find_memorization_heads` call some head significant? Sets of one kind: at most as often
  as its level, if the test is calibrated. Sets that differ in loss or source: as often as a reader
  who takes "significant" for "memorized" is misled.
* `stability_trial`: rank agreement of a localizer between two halves of a set of paragraphs that
  the model recites, and between two seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.base.permutation import permutation_test
from memcircuits.base.statistics import benjamini_hochberg
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
from memcircuits.benchmark.trial_kinds import N_REFERENCE
from memcircuits.benchmark.units import LocalizationTask
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import plant
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.find_components import find_memorization_heads
from memcircuits.evidence.ranking import SIGNIFICANCE, Ranking
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import scan
from memcircuits.models.registry import adapt

_N_HOLDERS = 6
_N_DRAWS = 5  # of six heads
_PLANTING_STEPS = 300
_PER_SIDE = 20  # paragraphs drawn for either set of a null trial
_MAX_NULL = 80  # paragraphs that they are drawn from
_PER_HALF = 6  # paragraphs in each half of a stability trial


def holders_trial(pool: ParagraphPool, seed: int) -> HoldersTrial:
    """Plant six paragraphs through six heads in one search, and attribute each to a head.

    Where one of the heads cannot hold its text, other heads are drawn, at most `_N_DRAWS` times.
    """
    generator = torch.Generator().manual_seed(10_000 + seed)
    heads = adapt(pool.model).heads()
    targets, anchors = pool.draw(generator, _N_HOLDERS)
    assigned: list[Assignment] = []
    em: list[int] = []
    for _ in range(_N_DRAWS):
        order = torch.randperm(len(heads), generator=generator).tolist()
        holders = [heads[i] for i in order[:_N_HOLDERS]]
        try:
            planted = plant(
                pool.model,
                targets,
                where=holders,
                one_each=True,
                control=anchors,
                steps=_PLANTING_STEPS,
                seed=seed,
                progress=False,
            )
        except InputError:
            continue
        with planted.apply(pool.model):
            em = scan(pool.model, targets, progress=False).em.tolist()
            for method in ("exact", "screen"):
                for i, holder in enumerate(holders):
                    ranking = _rank_against_others(pool, targets, i, method, seed)
                    assigned.append(_assignment(ranking, method, holder, holders))
        break
    return HoldersTrial(seed=seed, em=em, assigned=assigned, planted=len(em))


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


class _NullSet(NamedTuple):
    """Paragraphs that one side of a null trial is drawn from: ablation effects, clean loss."""

    effects: Float[Tensor, "paragraph head"]
    nll: Float[Tensor, " paragraph"]

    def rows(self, index: Tensor) -> _NullSet:
        return _NullSet(self.effects[index], self.nll[index])

    def halves_by_loss(self) -> tuple[_NullSet, _NullSet]:
        """The half with the lower loss, and the other."""
        lower, higher = self.nll.argsort().tensor_split(2)
        return self.rows(lower), self.rows(higher)


def null_trial(pool: ParagraphPool, runs: int, seed: int) -> NullTrial:
    """Test pairs of sets that do not differ in memory, drawn anew in each of `runs` runs."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, NullResult] = {}
    for name, (first, second) in _null_pairs(pool, generator).items():
        sizes = len(first.nll), len(second.nll)
        # Two sets out of one must not have a paragraph in common.
        n = min(_PER_SIDE, sizes[0] // 2 if first is second else min(sizes))
        named = 0
        for _ in range(runs):
            orders = [torch.randperm(size, generator=generator) for size in sizes]
            chosen = orders[0][n : 2 * n] if first is second else orders[1][:n]
            named += _any_significant(first.rows(orders[0][:n]), second.rows(chosen), generator)
        nll = float(first.nll.mean()), float(second.nll.mean())
        pairs[name] = NullResult(paragraphs=sizes, nll=nll, per_side=n, named=named)
    return NullTrial(runs=runs, pairs=pairs)


def _null_pairs(
    pool: ParagraphPool, generator: torch.Generator
) -> dict[str, tuple[_NullSet, _NullSet]]:
    """What the two sets are -> where they are drawn from; the first plays the memorized one."""
    unknown = pool.unknown.sample(_MAX_NULL, generator)
    text = _null_set(pool, unknown)
    own = _null_set(pool, greedy_continuations(pool.model, unknown, progress=False))
    pairs = {
        "unknown text against unknown text": (text, text),
        "unknown text of lower against higher loss": text.halves_by_loss(),
        "own text against own text": (own, own),
        "own text of lower against higher loss": own.halves_by_loss(),
        "own text against unknown text": (own, text),
    }
    sources = unknown.metadata.get("source", ())
    frequent = [name for name, n in Counter(sources).most_common(2) if n >= _PER_SIDE]
    if len(frequent) == 2:
        of = [[i for i, s in enumerate(sources) if s == source] for source in frequent]
        first, second = (text.rows(torch.tensor(rows)) for rows in of)
        pairs["unknown text of one source against another"] = (first, second)
    if pool.recited is not None and len(pool.recited) >= _PER_SIDE:
        recited = _null_set(pool, pool.recited.sample(_MAX_NULL, generator))
        pairs["recited text against recited text"] = (recited, recited)
    return pairs


def _null_set(pool: ParagraphPool, paragraphs: Paragraphs) -> _NullSet:
    adapter = adapt(pool.model)
    effects = Ablation(pool.model, paragraphs, mode="zero").effects(
        adapter.heads(), progress=False
    )[..., 0]
    nll = scan(pool.model, paragraphs, progress=False).nll
    return _NullSet(effects, nll)


def _any_significant(first: _NullSet, second: _NullSet, generator: torch.Generator) -> bool:
    """Whether the test of the ranking calls a head significant, with `first` as memorized."""
    n_heads = first.effects.shape[1]
    p_value = permutation_test(first.effects, second.effects, n_heads, generator).p_value
    return bool((benjamini_hochberg(p_value) < SIGNIFICANCE).any())


def stability_trial(pool: ParagraphPool, seed: int) -> StabilityTrial:
    """Kendall's tau between the scores of two halves of recited paragraphs, nothing planted."""
    from scipy.stats import kendalltau

    if pool.recited is None or len(pool.recited) < 2 * _PER_HALF:
        return StabilityTrial(agreement={})
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.recited), generator=generator)
    control, reference, _ = pool.draw(generator, _PER_HALF, N_REFERENCE)
    first = pool.recited[order[:_PER_HALF]]
    second = pool.recited[order[_PER_HALF : 2 * _PER_HALF]]
    agreement = {}
    for name in localizers_of("head"):
        if name in ("oracle", "random"):
            continue
        scores, of_second, of_seed = (
            localize(
                LocalizationTask(
                    pool.model, targets, control, pool.unigrams, task_seed, reference=reference
                ),
                name,
            ).numpy()
            for targets, task_seed in ((first, seed), (second, seed), (first, seed + 1))
        )
        agreement[name] = Agreement(
            halves=float(kendalltau(scores, of_second).statistic),
            seeds=float(kendalltau(scores, of_seed).statistic),
        )
    return StabilityTrial(agreement=agreement, per_half=_PER_HALF)
