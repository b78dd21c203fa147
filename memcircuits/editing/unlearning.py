"""Sparse unlearning and editing: change a few weights so that paragraphs are no longer recited.

The method is that of arXiv 2403.19851, section 5, with a further recipe:

1. Score every weight at the unedited model and keep the top fraction as a fixed mask
   (`memcircuits.editing.edit_search`).
2. Optimise one number per masked weight (`memcircuits.editing.optimization`) for the objective
   (`memcircuits.editing.unlearning_objective`) by a recipe (`memcircuits.editing.recipe`).
3. Stop as soon as every target is recited for fewer than `em_below` tokens, or when the KL on
   controls that the optimisation does not see passes `kl_budget`. The last change within the
   budget is kept. (`NATURAL_GRADIENT` first tries shorter steps from there.)
4. Restore the original weights and check by fingerprint that the model is bit for bit the one that
   was given, so that no weight outside the mask changed. Return the change as an `Edit`.

`unlearn` forgets paragraphs; `edit` replaces their continuations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict

import torch

from memcircuits.base.errors import InputError
from memcircuits.base.heads import HeadLike
from memcircuits.base.statistics import count_groups
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.draws import random_order, split_groups
from memcircuits.data.overlap import refuse_overlap
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.edit import Edit
from memcircuits.editing.edit_search import Editor
from memcircuits.editing.masks import Candidates, MaskStrategy
from memcircuits.editing.recipe import NATURAL_GRADIENT, EditOptions, Recipe
from memcircuits.editing.unlearning_objective import ReferenceDistribution, Targets
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

MAX_CONTROL = 80


@plain_torch()
def unlearn(  # noqa: PLR0913
    model: Model,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    fraction: float = 0.001,
    mask: MaskStrategy = "top",
    heads: Sequence[HeadLike] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    recipe: Recipe = NATURAL_GRADIENT,
    em_below: float | None = None,
    kl_budget: float | None = 0.002,
    curvature: Curvature | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Edit:
    """Find a sparse change of weights after which `memorized` are no longer recited.

    The model is unchanged when this returns; use `Edit.apply`.

    Args:
        model: the model.
        memorized: paragraphs to forget: `Paragraphs`, a list of strings or ids.
        control: paragraphs to keep, at least two; at most 80 are drawn. Every fifth is held out
            from the objective, to measure the KL.
        fraction: fraction of the candidate weights that may change, for each target if the recipe
            takes targets one by one. Candidates are the matrices of the blocks, or those asked for.
        mask: `top` fraction by score, or `top-per-component`, the same fraction of each component;
            for comparison `random`, `random-per-tensor` (as many in each matrix as `top` takes) or
            `all`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        em_below: stop when fewer tokens of every target are recited; by default a tenth of the
            continuation. 0: never.
        kl_budget: maximum KL on the held-out controls, nats/token; None: no limit.
        curvature: `control_curvature` of these controls and this seed, to share it among several
            edits of one model.
        seed: of the controls' draws, the curvature's labels and random masks.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        An `Edit`.

    Raises:
        InputError: for unusable paragraphs, controls that are among the memorized, an empty mask,
            or a loss that is no longer finite (the model is restored; the step is named).
    """
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    control = Paragraphs.of(control, model, "control")
    options = EditOptions(
        fraction=fraction,
        mask=mask,
        heads=heads,
        layers=layers,
        components=components,
        recipe=recipe,
        em_below=memorized.n_continuation / 10 if em_below is None else em_below,
        kl_budget=kl_budget,
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )
    return _find_edit(adapter, memorized, None, control, options)


@plain_torch()
def edit(  # noqa: PLR0913
    model: Model,
    memorized: ParagraphsLike,
    targets: ParagraphsLike,
    control: ParagraphsLike,
    *,
    fraction: float = 0.001,
    mask: MaskStrategy = "top",
    heads: Sequence[HeadLike] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    recipe: Recipe = NATURAL_GRADIENT,
    kl_budget: float | None = 0.002,
    curvature: Curvature | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Edit:
    """Find a sparse change of weights after which `memorized` prefixes continue like `targets`.

    Stops when every new continuation is recited in full; otherwise like `unlearn`.

    Args:
        model: the model.
        memorized: paragraphs to rewrite.
        targets: for each of them a paragraph whose continuation is to follow its prefix.
        control: paragraphs to keep, see `unlearn`.
        fraction: fraction of the candidate weights that may change.
        mask: see `unlearn`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        kl_budget: maximum KL on the held-out controls, nats/token; None: no limit.
        curvature: see `unlearn`.
        seed: of the controls' draws, the curvature's labels and random masks.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        An `Edit`; its history has also `em_new`, the recited tokens of the new continuations.

    Raises:
        InputError: as `unlearn`, or if `targets` do not match `memorized` in number and lengths.
    """
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    targets = Paragraphs.of(targets, model, "targets", bos=memorized.bos)
    if targets.ids.shape != memorized.ids.shape or targets.n_prefix != memorized.n_prefix:
        raise InputError("targets", repr(targets), f"give one for each of {memorized!r}, as long")
    if (targets.continuation == memorized.continuation).all(-1).any():
        raise InputError("targets", "one continues as memorized", "give another continuation")
    memorized.check_same_bos(targets, "targets")
    new_ids = torch.cat([memorized.prefix, targets.continuation], 1)
    new = memorized.with_ids(new_ids)
    adapter.check_tokens(new.inputs, "targets")
    control = Paragraphs.of(control, model, "control")
    options = EditOptions(
        fraction=fraction,
        mask=mask,
        heads=heads,
        layers=layers,
        components=components,
        recipe=recipe,
        em_below=0.0,
        kl_budget=kl_budget,
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )
    return _find_edit(adapter, memorized, new, control, options)


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


def _find_edit(
    adapter: Adapter,
    memorized: Paragraphs,
    new: Paragraphs | None,
    control: Paragraphs,
    options: EditOptions,
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
    )
    curvature = _curvature(adapter, seen, candidates, options)
    targets = Targets(adapter, memorized, new, recipe.objective, options.em_below, memory_budget)
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
            if recipe.curvature == "none"
            else None,
            held_out=ReferenceDistribution.of(adapter, held_out, memory_budget),
            generator=torch.Generator().manual_seed(options.seed),
            undo=undo,
        )
        find = editor.edit_one_by_one if one_by_one else editor.edit_together
        mask, result = find(targets, options.progress)
        after = mask.read()
    if adapter.fingerprint() != provenance.model["fingerprint"]:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Edit.of(mask, mask.read(), after, provenance, **result.report)


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
