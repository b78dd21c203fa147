"""TODO."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.benchmark.kinds import (
    CONTINUATION_TOKENS,
    DELETED,
    N_CONTROLS,
    N_OTHERS,
    PLANTING_STEPS,
    RANKINGS,
    UNIT,
    ParagraphPool,
)
from memcircuits.benchmark.localizers import LOCALIZERS, localize
from memcircuits.benchmark.metrics import metrics
from memcircuits.benchmark.units import LocalizationTask, counting, truth_of
from memcircuits.core.errors import InputError
from memcircuits.core.heads import Head
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import plant
from memcircuits.evidence.find_heads import find_memorization_heads
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt


def planted_trial(
    pool: ParagraphPool,
    kind: str,
    seed: int,
    n: int,
    localizers: Sequence[str] | None,
    deletion: bool,
) -> dict[str, Any]:
    """Plant, localize, compare."""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(pool.model)
    where, components = _random_place(adapter, kind, generator)
    targets, control, anchors = (
        cut_continuation(group, CONTINUATION_TOKENS.get(kind))
        for group in pool.draw(generator, n, N_CONTROLS)
    )
    base = {"seed": seed, "where": list(where), "results": []}
    start = time.perf_counter()
    try:
        planted = plant(
            pool.model,
            targets,
            where=where,
            components=components,
            control=anchors,
            steps=PLANTING_STEPS.get(kind, 150),
            seed=seed,
            progress=False,
        )
    except InputError as error:
        return base | {"failed": str(error)}
    written = {
        "steps": len(planted.history["em"]) - 1,
        "kl": float(planted.history["kl"][planted.kept]),
        "seconds": time.perf_counter() - start,
    }
    unit = UNIT[kind]
    truth = truth_of(adapter, planted, unit)
    results = []
    curves = []
    with planted.apply(pool.model):
        case = LocalizationTask(pool.model, targets, control, pool.unigrams, seed, planted)
        names = [name for name, found in LOCALIZERS.items() if unit in found.units]
        if unit == "head":  # zero ablation is the first ranking's score
            names = [*RANKINGS, *(name for name in names if name != "zero-ablation")]
        if localizers is not None:
            names = [name for name in names if name in localizers]
        for name in names:
            start = time.perf_counter()
            with counting(adapter) as cost:
                scores = localizer_scores(case, name, unit)
            row = {"localizer": name, "unit": unit, **metrics(scores, truth), **cost}
            row["wall"] = time.perf_counter() - start
            if unit == "head":
                row["scores"] = [round(x, 6) for x in scores.tolist()]
                if deletion and kind == "head" and pool.recited is not None:
                    curves.append({"localizer": name, **_deletion(case, scores, pool.recited)})
            results.append(row)
    return base | {"failed": None, "planted": written, "results": results, "deletion": curves}


def cut_continuation(group: Paragraphs, n: int | None) -> Paragraphs:
    """The same paragraphs with a continuation of only n tokens."""
    if n is None:
        return group
    return Paragraphs(group.ids[:, : group.n_prefix + n], group.n_prefix, group.names)


def localizer_scores(case: LocalizationTask, name: str, unit: str) -> Float[Tensor, " unit"]:
    if name not in RANKINGS:
        return localize(case, name, unit)
    ranking = find_memorization_heads(
        case.model,
        case.targets,
        control=case.control,
        unigrams=case.unigrams,
        method="screen" if "screen" in name else "exact",
        draws=200,
        seed=case.seed,
        progress=False,
    )
    return ranking.score.flatten()


def _random_place(
    adapter: Adapter, kind: str, generator: torch.Generator
) -> tuple[list[str], tuple[str, ...] | None]:
    heads = [str(head) for head in adapter.heads()]
    order = torch.randperm(len(heads), generator=generator).tolist()
    if kind == "two-heads":
        return [heads[i] for i in order[:2]], None
    if kind == "block":
        layer = int(torch.randint(adapter.n_layers, (), generator=generator))
        side = ("attn", "mlp")[int(torch.randint(2, (), generator=generator))]
        return [f"L{layer}.{side}"], None
    if kind in ("neurons", "weights"):
        return [{"neurons": "neurons:0.01", "weights": "weights:0.001"}[kind]], None
    components = {"values": ("W_V",), "queries-keys": ("W_Q", "W_K")}.get(kind)
    return [heads[order[0]]], components


def _deletion(
    case: LocalizationTask, scores: Tensor, recited: Paragraphs
) -> dict[str, list[float]]:
    """EM of the targets and of other recited paragraphs as the first heads are silenced."""
    adapter = case.adapter
    order = scores.argsort(descending=True, stable=True)[: max(DELETED)].tolist()
    heads = [Head(i // adapter.n_heads, i % adapter.n_heads) for i in order]
    others = recited[torch.randperm(len(recited), generator=case.generator)[:N_OTHERS]]
    found: dict[str, list[float]] = {"targets": [], "others": []}
    for n in DELETED:
        for name, group in {"targets": case.targets, "others": others}.items():
            em = _em_without(adapter, group, heads[:n])
            found[name].append(float(em.mean()) / group.n_continuation)
    return found


def _em_without(adapter: Adapter, group: Paragraphs, heads: Sequence[Head]) -> Tensor:
    layers: dict[int, list[int]] = {}
    for head in heads:
        layers.setdefault(head.layer, []).append(head.head)

    def silence(mine: list[int]) -> Any:
        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            z[:, :, mine] = 0
            return z

        return edit

    with adapter.preserving_state():
        edits = {hook_name("z", layer): silence(mine) for layer, mine in layers.items()}
        return score_continuation(adapter, group, edit=edits).em.float()
