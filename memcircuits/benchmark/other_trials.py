"""TODO."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from memcircuits.benchmark.kinds import N_HOLDERS, ParagraphPool
from memcircuits.benchmark.localizers import LOCALIZERS, localize
from memcircuits.benchmark.units import LocalizationTask
from memcircuits.core.errors import InputError
from memcircuits.core.statistics import benjamini_hochberg, permuted_differences
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import Planted, plant
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.find_heads import find_memorization_heads
from memcircuits.evidence.ranking import SIGNIFICANCE
from memcircuits.measure.scanning import scan
from memcircuits.models.registry import adapt


def holders_trial(pool: ParagraphPool, seed: int) -> dict[str, Any]:
    """Six paragraphs through six heads of one model: which head holds which?"""
    generator = torch.Generator().manual_seed(10_000 + seed)
    adapter = adapt(pool.model)
    order = torch.randperm(adapter.n_layers * adapter.n_heads, generator=generator).tolist()
    targets, anchors = pool.draw(generator, 2 * N_HOLDERS)
    done: list[tuple[Planted, Paragraphs]] = []
    assigned: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for i, target in enumerate(targets):
            if len(done) == N_HOLDERS:
                break
            # What the heads before hold must stay: few other anchors, so that it is seen often.
            keep = anchors[:N_HOLDERS]
            for _, other in done:
                keep = keep + other
            place = str(adapter.heads()[order[i]])
            with contextlib.suppress(InputError):
                planted = plant(
                    pool.model,
                    target,
                    where=place,
                    control=keep,
                    steps=150,
                    seed=seed,
                    progress=False,
                )
                stack.enter_context(planted.apply(pool.model))
                done.append((planted, target))
        if len(done) < 2:  # nobody to tell apart
            return {"seed": seed, "em": [], "assigned": [], "planted": len(done)}
        held = done[0][1]
        for _, target in done[1:]:
            held = held + target
        em = scan(pool.model, held, progress=False).em.tolist()
        holders = [planted.truth.heads[0] for planted, _ in done]
        for method in ("exact", "screen"):
            for i, holder in enumerate(holders):
                rest = held[[j for j in range(len(held)) if j != i]]
                ranking = (
                    find_memorization_heads(
                        pool.model,
                        held[i],
                        control=rest,
                        unigrams=pool.unigrams,
                        method=method,
                        draws=200,
                        seed=seed,
                        progress=False,
                    )
                    if em[i] == held.n_continuation
                    else None
                )
                if ranking is None:
                    continue
                six = [float(ranking.score[head]) for head in holders]
                assigned.append(
                    {
                        "method": method,
                        "holder": str(holder),
                        "first": str(ranking.top(1)[0]),
                        "among_holders": str(holders[max(range(len(six)), key=six.__getitem__)]),
                    }
                )
    return {"seed": seed, "em": em, "assigned": assigned, "planted": len(done)}


def null_trial(pool: ParagraphPool, runs: int, seed: int) -> dict[str, Any]:
    """How often is a head called significant between halves of sets that do not differ?"""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(pool.model)
    groups = {"unknown": pool.unknown, "recited": pool.recited}
    found: dict[str, Any] = {"runs": runs}
    for name, group in groups.items():
        if group is None or len(group) < 20:
            continue
        chosen = group[torch.randperm(len(group), generator=generator)[:60]]
        effects = Ablation(pool.model, chosen, mode="zero").effects(
            adapter.heads(), progress=False
        )[..., 0]
        n = min(20, len(chosen) // 2)
        named = 0
        for _ in range(runs):
            order = torch.randperm(len(chosen), generator=generator)
            a, b = effects[order[:n]], effects[order[n : 2 * n]]
            null = permuted_differences(a, b, 1000, generator)
            score = a.mean(0) - b.mean(0)
            p = (1 + (null >= score).sum(0)) / 1001
            named += bool((benjamini_hochberg(p) < SIGNIFICANCE).any())
        found[name] = {"paragraphs": len(chosen), "per_side": n, "named": named}
    return found


def stability_trial(pool: ParagraphPool, seed: int) -> dict[str, Any]:
    """Kendall's tau between the scores of two halves of recited paragraphs, nothing planted."""
    from scipy.stats import kendalltau

    if pool.recited is None or len(pool.recited) < 12:
        return {"agreement": {}}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.recited), generator=generator)
    (control, _) = pool.draw(generator, 6)
    halves = [pool.recited[order[:6]], pool.recited[order[6:12]]]
    names = [
        n for n, f in LOCALIZERS.items() if "head" in f.units and n not in ("oracle", "random")
    ]
    agreement = {}
    for name in names:
        first, second, again = (
            localize(LocalizationTask(pool.model, half, control, pool.unigrams, s), name)
            for half, s in ((halves[0], seed), (halves[1], seed), (halves[0], seed + 1))
        )
        agreement[name] = {
            "halves": float(kendalltau(first.numpy(), second.numpy()).statistic),
            "seeds": float(kendalltau(first.numpy(), again.numpy()).statistic),
        }
    return {"agreement": agreement, "per_half": 6}
