"""What `unlearn` and `edit` share: check, choose masks, search, restore, return the change.

The model is restored on every way out, and its fingerprint is compared: no weight outside the mask
may have changed.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict

import torch

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import count_groups
from memcircuits.data.draws import random_order, split_groups
from memcircuits.data.overlap import refuse_overlap
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.deep_search import find_deep_edit
from memcircuits.editing.edit import Edit
from memcircuits.editing.edit_search import Editor
from memcircuits.editing.masks import Candidates
from memcircuits.editing.recipe import NATURAL_GRADIENT, EditOptions
from memcircuits.editing.unlearning_objective import ReferenceDistribution, Targets
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

MAX_CONTROL = 80


def control_curvature(
    model: Model,
    control: ParagraphsLike,
    *,
    draws: int = NATURAL_GRADIENT.draws,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Curvature:
    """The curvature that `unlearn` and `edit` estimate from these controls, to share among edits.

    The sampled gradients of all weights are stored, two bytes per entry, if they fit into memory.

    Args:
        model: the model.
        control: the paragraphs that `unlearn` will be given.
        draws: labels drawn for each position.
        seed: the seed that `unlearn` will be given.
        memory_budget: maximum bytes per batch.
    """
    adapter = adapt(model)
    control = Paragraphs.of(control, model, "control")
    adapter.check_tokens(control.inputs, "control")
    seen, _ = split_control(control, seed)
    return Curvature.of(
        adapter,
        seen,
        adapter.weights(),
        draws=draws,
        seed=seed,
        memory_budget=memory_budget,
        keep=True,
    )


def split_control(control: Paragraphs, seed: int) -> tuple[Paragraphs, Paragraphs]:
    """Draw at most 80 controls: those that the optimisation sees, and those held out from it.

    A fifth of the independent groups is held out: no group is on both sides.

    Raises:
        InputError: if there are fewer than two controls, or all depend on each other.
    """
    if len(control) < 2:
        raise InputError("control", "one paragraph", "one is held out: give at least two")
    generator = torch.Generator().manual_seed(seed)
    order = random_order(control.groups, generator)[:MAX_CONTROL]
    n_groups = count_groups(control.groups[order])
    held_out, seen = split_groups(control.groups, order, max(1, n_groups // 5))
    return control[seen], control[held_out]


def find_edit(
    adapter: Adapter,
    memorized: Paragraphs,
    new: Paragraphs | None,
    control: Paragraphs,
    options: EditOptions,
    twin: Adapter | None = None,
) -> Edit:
    """Choose masks, search, restore the model and return the change; `new` is that of `edit`."""
    recipe, memory_budget = options.recipe, options.memory_budget
    candidates = Candidates.of(
        adapter, heads=options.heads, layers=options.layers, components=options.components
    )
    groups = {"memorized": memorized, "targets": new, "control": control}
    _check_groups(adapter, groups, memory_budget)
    seen, held_out = split_control(control, options.seed)
    provenance = Provenance.of(
        adapter,
        groups,
        fraction=options.fraction,
        mask=options.mask,
        recipe=asdict(recipe),
        em_below=options.em_below,
        kl_budget=options.kl_budget,
        seed=options.seed,
        twin=None if twin is None else twin.label,
    )
    curvature = _curvature(adapter, seen, candidates, options)
    targets = Targets.of(adapter, memorized, new, recipe.objective, options.em_below, memory_budget)
    # A forgotten paragraph stays forgotten while later ones are taken; a new continuation may not.
    # And with em_below = 0 only the budget would end the turn of the first target.
    one_by_one = recipe.one_by_one and len(targets) > 1 and new is None and options.em_below > 0
    with contextlib.ExitStack() as undo:
        editor = Editor(
            adapter=adapter,
            options=options,
            candidates=candidates,
            curvature=curvature,
            seen=ReferenceDistribution.of(adapter, seen, memory_budget)
            if recipe.takes_adam
            else None,
            held_out=ReferenceDistribution.of(adapter, held_out, memory_budget),
            generator=torch.Generator().manual_seed(options.seed),
            undo=undo,
        )
        if recipe.objective == "reference":
            mask, result = find_deep_edit(editor, memorized, seen, twin)
        elif one_by_one:
            mask, result = editor.edit_one_by_one(targets, options.progress)
        else:
            mask, result = editor.edit_together(targets, options.progress)
        after = mask.read()
    if adapter.fingerprint() != provenance.model["fingerprint"]:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Edit.of(mask, mask.read(), after, provenance, **result.report)


def budget(given: float | None, default: float | None) -> float | None:
    """The budget of `EditOptions`, where None is no limit."""
    if given is None:
        return default
    return None if given == math.inf else given


def _check_groups(
    adapter: Adapter, groups: dict[str, Paragraphs | None], memory_budget: int | None
) -> None:
    """Refuse tokens the model does not have, overlaps and non-finite logits."""
    memorized, control = groups["memorized"], groups["control"]
    assert memorized is not None
    assert control is not None
    adapter.check_tokens(memorized.inputs, "memorized")
    adapter.check_tokens(control.inputs, "control")
    refuse_overlap(memorized, control, same="prefix")
    for name, group in groups.items():
        if group is None:
            continue
        if not has_finite_scores(adapter, group, name, memory_budget).all():
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )


def _curvature(
    adapter: Adapter, seen: Paragraphs, candidates: Candidates, options: EditOptions
) -> Curvature | None:
    """The curvature that the recipe needs: the one given, if it fits, or a new estimate.

    Raises:
        InputError: if the one given is of other weights or controls.
    """
    if not options.recipe.needs_curvature:
        return None
    given = options.curvature
    if given is None:
        return Curvature.of(
            adapter,
            seen,
            candidates.weights,
            draws=options.recipe.draws,
            seed=options.seed,
            memory_budget=options.memory_budget,
        )
    if (given.fingerprint, given.control.hash) != (adapter.fingerprint(), seen.hash):
        raise InputError(
            "curvature", "of other weights, controls or seed", "make it of those given here"
        )
    return given
