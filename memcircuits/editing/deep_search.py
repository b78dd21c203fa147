"""The search of deep unlearning: its reference, the texts to keep, its mask and its steps.

Some texts are harder to forget than others. Where a target is still recited from some entry after
all steps, the search goes on from there with half the weight on what is kept, at most `ROUNDS`
times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.deep_objective import DeepObjective
from memcircuits.editing.edit_search import Editor
from memcircuits.editing.masks import Mask
from memcircuits.editing.optimization import SearchResult, search
from memcircuits.editing.references import proxy_log_probs
from memcircuits.editing.unlearning_objective import ReferenceDistribution
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.adapter import Adapter

ROUNDS = 3


def find_deep_edit(
    editor: Editor, memorized: Paragraphs, seen: Paragraphs, twin: Adapter | None
) -> tuple[Mask, SearchResult]:
    """Search all targets together; the change found is in the model afterwards.

    Args:
        editor: what all targets share.
        memorized: the targets.
        seen: controls to keep, from which attacked entries also take other tokens.
        twin: a model that was not trained on the targets; None: the proxy stands in.

    Returns:
        The mask, and the result of the search.
    """
    options, recipe = editor.options, editor.options.recipe
    adapter, generator, budget = editor.adapter, editor.generator, options.memory_budget
    reference = _reference(adapter, memorized, seen, twin, generator, budget)
    own = greedy_continuations(adapter, seen, memory_budget=budget, progress=False)
    assert editor.seen is not None  # `EditOptions`: this objective takes Adam
    objective = DeepObjective(
        adapter=adapter,
        memorized=memorized,
        reference=reference,
        fillers=seen,
        kept=[editor.seen, ReferenceDistribution.of(adapter, own, budget)],
        held_out=editor.held_out,
        kl_budget=math.inf if options.kl_budget is None else options.kl_budget,
        token_weight=recipe.token_weight,
        kl_weight=recipe.kl_weight,
        control_batch=recipe.control_batch,
        em_below=options.em_below,
        generator=generator,
        memory_budget=budget,
    )
    mask = _choose_mask(editor, objective)
    original = editor.undo.enter_context(mask.restored())
    rounds: list[SearchResult] = []
    change = torch.zeros(len(mask), device=mask.device)
    for _ in range(ROUNDS):
        result = search(
            objective,
            editor.adam_steps(mask, change),
            mask,
            original,
            steps=recipe.steps,
            label="unlearn",
            progress=options.progress,
        )
        rounds.append(result)
        if result.change is None:  # even the first change of the round was over the budget
            break
        change = result.change
        mask.add(original, change)
        if result.stopped == "kl" or objective.is_forgotten(mask):
            break
        objective = replace(objective, kl_weight=objective.kl_weight / 2)
    mask.add(original, change)
    return mask, _joined(rounds, change)


def _joined(rounds: Sequence[SearchResult], change: Float[Tensor, " weight"]) -> SearchResult:
    """All rounds as one search."""
    history = {
        name: torch.cat([result.history[name] for result in rounds]) for name in rounds[0].history
    }
    n_before = sum(len(result.history["em"]) for result in rounds[:-1])
    return SearchResult(change, history, n_before + rounds[-1].kept, rounds[-1].stopped)


def _reference(
    adapter: Adapter,
    memorized: Paragraphs,
    fillers: Paragraphs,
    twin: Adapter | None,
    generator: torch.Generator,
    memory_budget: int | None,
) -> Float[Tensor, "paragraph pos d_vocab"]:
    if twin is not None:
        return ReferenceDistribution.of(twin, memorized, memory_budget).log_p.cpu()
    return proxy_log_probs(adapter, memorized, fillers, generator, memory_budget)


def _choose_mask(editor: Editor, objective: DeepObjective) -> Mask:
    """All candidates, or the fraction with the largest gradients of the objective's first term."""
    options, candidates = editor.options, editor.candidates
    every = candidates.choose(1.0, None, "all")
    if options.mask == "all" or options.fraction == 1:
        return every
    if options.mask == "random":
        return candidates.choose(options.fraction, None, "random", editor.generator)
    scores = []
    matrices = every.spread(objective.scores(every))
    for weight, matrix in zip(every.weights, matrices, strict=True):
        score = torch.zeros_like(weight.parameter, dtype=torch.float32)
        weight.split(score).copy_(matrix)
        scores.append(score)
    return candidates.choose(options.fraction, scores, options.mask, editor.generator)
