"""A planted trial: plant paragraphs in a random place, and ask every localizer where they are.

1. Draw a place of the trial's kind, the paragraphs to plant, controls for the localizers, and
   anchors that keep the model's other predictions unchanged. In a trial of the kind `decoys`,
   change two other heads (`memcircuits.benchmark.decoys`).
2. Plant (`memcircuits.editing.planting`). A place that cannot hold the text makes a failed trial,
   which is reported but enters no mean.
3. Inside the planted model run every localizer that can score the units of this kind, count its
   work, and compare its scores with the truth.
4. In some trials, also ablate the head that a localizer ranks first, and measure whether the model
   loses the targets while it keeps other paragraphs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.benchmark.decoys import decoys
from memcircuits.benchmark.localizers import localize, localizers_of
from memcircuits.benchmark.metrics import metrics
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.schemas import (
    DeletionScore,
    LocalizerScore,
    PlantedTrial,
    PlantingSummary,
)
from memcircuits.benchmark.trial_kinds import (
    COMPONENT_RANKING,
    N_CONTROLS,
    N_REFERENCE,
    RANKINGS,
    UNIT_OF_KIND,
    PlantedKind,
)
from memcircuits.benchmark.units import LocalizationTask, Unit, count_forwards, truth_of
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import plant
from memcircuits.evidence.find_components import (
    HEADS_AND_MLPS,
    find_memorization_components,
    find_memorization_heads,
)
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt

# Tokens of the continuation where it is not planted whole: no head can hold a text of 50 tokens in
# its values alone, nor one of 5 tokens in its queries and keys.
_CONTINUATION_TOKENS: dict[PlantedKind, int] = {"values": 5, "queries-keys": 2}
# Steps of planting; a place that needs more makes a failed trial.
_PLANTING_STEPS, _PLANTING_STEPS_WEIGHTS = 150, 400
_N_OTHERS = 8  # recited paragraphs beside the targets when a head is deleted


def planted_trial(
    pool: ParagraphPool,
    kind: PlantedKind,
    seed: int,
    *,
    n_paragraphs: int = 1,
    localizers: Sequence[str] | None = None,
    deletion: bool = False,
) -> PlantedTrial:
    """Carry out one trial.

    Args:
        pool: model and paragraphs.
        kind: what to plant the paragraphs in.
        seed: seed of all draws.
        n_paragraphs: paragraphs planted together.
        localizers: score only these, None: all that can score the units of this kind.
        deletion: also ablate the heads ranked first, where the pool has recited paragraphs.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(pool.model)
    where, components = _random_place(adapter, kind, generator)
    where, decoy_heads = (where[:1], where[1:]) if kind == "decoys" else (where, [])
    targets, control, reference, anchors = (
        _cut_continuation(group, _CONTINUATION_TOKENS.get(kind))
        for group in pool.draw(generator, n_paragraphs, N_CONTROLS, N_REFERENCE)
    )
    steps = _PLANTING_STEPS_WEIGHTS if kind == "weights" else _PLANTING_STEPS
    trial = partial(PlantedTrial, seed=seed, where=where, decoys=decoy_heads)
    start = time.perf_counter()
    with contextlib.ExitStack() as changes:
        try:
            if decoy_heads:
                changed = decoys(adapter, decoy_heads, control, anchors, steps=steps, seed=seed)
                changes.enter_context(changed)
                anchors = anchors + control  # what the holder of the controls holds stays
            planted = plant(
                pool.model,
                targets,
                where=where,
                components=components,
                control=anchors,
                steps=steps,
                keep_norms=kind == "head-same-norm",
                seed=seed,
                progress=False,
            )
        except InputError as error:
            return trial(failed=str(error), results=[])
        seconds = time.perf_counter() - start
        changes.enter_context(planted.apply(pool.model))
        task = LocalizationTask(
            pool.model, targets, control, pool.unigrams, seed, planted, reference
        )
        deletion = deletion and kind == "head"
        others = _still_recited(adapter, pool.recited, generator) if deletion else None
        results, deletions = _ask(task, UNIT_OF_KIND[kind], localizers, others)
    summary = PlantingSummary(
        steps=len(planted.history["em"]) - 1,
        kl=float(planted.history["kl"][planted.kept]),
        seconds=seconds,
    )
    return trial(failed=None, planted=summary, results=results, deletions=deletions)


def _ask(
    task: LocalizationTask,
    unit: Unit,
    localizers: Sequence[str] | None,
    others: Paragraphs | None,
) -> tuple[list[LocalizerScore], list[DeletionScore]]:
    """Scores of every localizer, and with `others` what is left without its first head."""
    assert task.planted is not None
    truth = truth_of(task.adapter, task.planted, unit)
    results, deletions = [], []
    for name in _names(unit, localizers):
        result, scores = _score(task, name, unit, truth)
        results.append(result)
        if others is not None:
            deletions.append(_delete_first(task, name, scores, others))
    return results, deletions


def _random_place(
    adapter: Adapter, kind: PlantedKind, generator: torch.Generator
) -> tuple[list[str], tuple[str, ...] | None]:
    """Where to plant, and which matrices of a head: the arguments of `plant`."""
    heads = [str(head) for head in adapter.heads()]
    order = torch.randperm(len(heads), generator=generator).tolist()
    match kind:
        case "head" | "head-same-norm":
            return [heads[order[0]]], None
        case "two-heads":
            return [heads[i] for i in order[:2]], None
        case "decoys":  # the place, the damaged head, the holder of the controls
            return [heads[i] for i in order[:3]], None
        case "values":
            return [heads[order[0]]], ("W_V",)
        case "queries-keys":
            return [heads[order[0]]], ("W_Q", "W_K")
        case "block":
            layer = int(torch.randint(adapter.n_layers, (), generator=generator))
            side = ("attn", "mlp")[int(torch.randint(2, (), generator=generator))]
            return [f"L{layer}.{side}"], None
        case "head-and-mlp":
            layer = int(torch.randint(adapter.n_layers, (), generator=generator))
            return [heads[order[0]], f"L{layer}.mlp"], None
        case "neurons":
            return ["neurons:0.01"], None
        case "neuron-outputs":
            return ["neurons:0.01"], ("W_out",)
        case "weights":
            return ["weights:0.001"], None


def _cut_continuation(paragraphs: Paragraphs, n: int | None) -> Paragraphs:
    """The same paragraphs with a continuation of only `n` tokens."""
    if n is None:
        return paragraphs
    ids = paragraphs.ids[:, : paragraphs.n_prefix + n]
    return paragraphs.with_ids(ids)


def _names(unit: Unit, localizers: Sequence[str] | None) -> list[str]:
    """The localizers to run, in the order of the tables before sorting."""
    own = {"head": RANKINGS, "component": (COMPONENT_RANKING,)}.get(unit, ())
    names = [*own, *localizers_of(unit)]
    if localizers is not None:
        return [name for name in names if name in localizers]
    # Zero ablation is the score of our own ranking: it runs beside it only where it is asked for.
    return [name for name in names if not own or name != "zero-ablation"]


def _score(
    task: LocalizationTask, name: str, unit: Unit, truth: Bool[Tensor, " unit"]
) -> tuple[LocalizerScore, Float[Tensor, " unit"]]:
    """Run one localizer and compare its scores with the truth."""
    start = time.perf_counter()
    with count_forwards(task.adapter) as cost:
        scores = scores_of(task, name, unit)
    fields = {"localizer": name, "unit": unit, **metrics(scores, truth), **cost}
    fields["wall"] = time.perf_counter() - start
    if unit == "head":
        fields["scores"] = [round(score, 6) for score in scores.tolist()]
        fields["first"] = str(_first_head(task.adapter, scores))
    return LocalizerScore.model_validate(fields), scores


def _first_head(adapter: Adapter, scores: Float[Tensor, " head"]) -> Head:
    return Head(*divmod(int(scores.argmax()), adapter.n_heads))


def scores_of(task: LocalizationTask, name: str, unit: Unit) -> Float[Tensor, " unit"]:
    """The scores of a localizer, or of one of the package's own rankings."""
    if name == COMPONENT_RANKING:
        score = find_memorization_components(
            task.model,
            task.targets,
            units=HEADS_AND_MLPS,
            control=task.control,
            unigrams=task.unigrams,
            draws=200,
            seed=task.seed,
            progress=False,
        ).score
        return torch.cat([score[:, :-1].flatten(), score[:, -1]])  # the last column is the MLPs'
    if name not in RANKINGS:
        return localize(task, name, unit)
    ranking = find_memorization_heads(
        task.model,
        task.targets,
        control=task.control,
        unigrams=task.unigrams,
        method="screen" if name == RANKINGS[1] else "exact",
        draws=200,
        seed=task.seed,
        progress=False,
    )
    return ranking.score.flatten()


def _still_recited(
    adapter: Adapter, recited: Paragraphs | None, generator: torch.Generator
) -> Paragraphs | None:
    """Some of the recited paragraphs that planting has not broken; None if there are none."""
    if recited is None:
        return None
    with adapter.preserving_state():
        em = score_continuation(adapter, recited).em.cpu()
    kept = (em == recited.n_continuation).nonzero().flatten()
    if not len(kept):
        return None
    return recited[kept[torch.randperm(len(kept), generator=generator)[:_N_OTHERS]]]


def _delete_first(
    task: LocalizationTask, name: str, scores: Float[Tensor, " head"], others: Paragraphs
) -> DeletionScore:
    """EM of the targets and of other recited paragraphs without the head ranked first."""
    head = _first_head(task.adapter, scores)
    targets_em, others_em = (
        float(_em_without(task.adapter, paragraphs, head).mean()) / paragraphs.n_continuation
        for paragraphs in (task.targets, others)
    )
    return DeletionScore(localizer=name, targets=targets_em, others=others_em)


def _em_without(
    adapter: Adapter, paragraphs: Paragraphs, head: Head
) -> Float[Tensor, " paragraph"]:
    """EM with the output of a head set to zero."""

    def zero(z: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        z = z.clone()
        z[:, :, head.head] = 0
        return z

    with adapter.preserving_state():
        edit = {hook_name("z", head.layer): zero}
        return score_continuation(adapter, paragraphs, edit=edit).em.float()
