"""Cut it out: change a few weights so that paragraphs are no longer recited, and little else.

The objective is the paper's equation 3, both terms means per continuation token given the true
tokens before it, in nats:

    weight * KL(original || current) on the controls  +  forgetting on the memorized

1. Score every weight at the unedited model and keep the top fraction as a fixed mask.
2. Optimise a vector with one number per masked weight. Nothing else can change: each step writes
   `original + delta` into the masked places.
3. Stop as soon as every target is recited for fewer than `em_below` tokens, or when the KL on
   controls that nothing else sees passes `kl_budget`; the last step within it is kept. (`NATURAL_GRADIENT`
   first tries shorter steps from there.)
4. Put the original weights back, check by fingerprint that the model is bit for bit the one that
   came in (so that no weight outside the mask had moved), and return the change as an `Edit`.

`STOEHR_2024` is the paper's recipe: forgetting is 0.1 times the log-likelihood, the KL is summed over
the positions, and Adam follows the gradient of the sum. `NATURAL_GRADIENT`, the default, differs in this:

* *Objective*: the number of tokens recited when sampling, sum over k of p_1 ... p_k, as log(1 + .),
  where a falling log-likelihood of all the tokens has no end and pulls also at those that are never
  reached. A paragraph that is forgotten pulls no further.
* *Curvature*: the cost on the controls is the quadratic model of `memcircuits.editing.curvature`. Where
  Adam changes every masked weight alike and lets the KL pull it back, a step here is F^-1 g, the
  change that forgets most for its KL, with a length of `step_kl`. The mask takes the weights whose
  own gain is largest for their KL. (`memcircuits.evidence.gradients.parameters` says why the KL term itself has no say
  in a mask taken at the unedited model.)
* *Shrinking*: at the end, delta is scaled back as far as the targets stay forgotten.
* *One by one*: each of several targets has a mask and steps of its own, at the weights that the
  earlier ones left, until all are forgotten. What the quadratic model says of a step that pushes
  forty texts off their way at once is far too little. The mask is then the union of theirs.

What is forgotten is the way in: a model that takes another first step no longer recites, though it
may still know the rest. `NATURAL_GRADIENT` with `objective="margin"` and `em_below=0` spends the whole
budget on pushing every token of the continuation off the greedy path.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from memcircuits.core.errors import InputError, at_least, one_of, positive
from memcircuits.core.errors import fraction as check_fraction
from memcircuits.core.heads import Head
from memcircuits.data.paragraphs import Paragraphs, refuse_overlap
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.edit import Edit
from memcircuits.editing.masks import CHOICES, Candidates
from memcircuits.editing.objective import ReferenceDistribution, Targets
from memcircuits.editing.recipe import CURVATURES, NATURAL_GRADIENT, OBJECTIVES, Recipe
from memcircuits.editing.search import Editor
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

MAX_CONTROL = 80


def unlearn(
    model: Any,
    memorized: Any,
    control: Any,
    *,
    fraction: float = 0.001,
    mask: str = "top",
    heads: Sequence[Head | str] | None = None,
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

    The model itself is as before when this returns; use `Edit.apply`.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs to forget: `Paragraphs`, a list of strings or ids.
        control: paragraphs to keep, at least two; at most 80 are drawn. Every fifth is held out
            from the objective, to measure the KL.
        fraction: how many of the candidate weights may change, for each target if the recipe goes
            one by one. Candidates are the matrices of the blocks, or those asked for.
        mask: `top` fraction by score; for comparison `random`, `random-per-tensor` (as many in each
            matrix as `top` takes) or `all`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        em_below: stop when every target is recited for fewer tokens; by default a tenth of the
            continuation. 0: never.
        kl_budget: nats/token of KL that the held-out controls may show; None: no limit.
        curvature: `control_curvature` of these controls and this seed, where it serves several
            edits of one model.
        seed: of the controls' draws, the curvature's labels and random masks.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        An `Edit`.

    Raises:
        InputError: for unusable paragraphs, controls that are among the memorized, an empty mask,
            or a loss that is no longer finite (the model is restored; the step is named).
    """
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    return _find(
        adapter,
        memorized,
        None,
        Paragraphs.of(control, model, "control"),
        Candidates.of(adapter, heads=heads, layers=layers, components=components),
        fraction=fraction,
        how=mask,
        recipe=recipe,
        em_below=memorized.n_continuation / 10 if em_below is None else em_below,
        kl_budget=kl_budget,
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )


def edit(
    model: Any,
    memorized: Any,
    targets: Any,
    control: Any,
    *,
    fraction: float = 0.001,
    mask: str = "top",
    heads: Sequence[Head | str] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    recipe: Recipe = NATURAL_GRADIENT,
    kl_budget: float | None = 0.002,
    curvature: Curvature | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Edit:
    """Find a sparse change of weights after which `memorized` prefixes go on like `targets`.

    Stops when every new continuation is recited in full; otherwise like `unlearn`.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs to rewrite.
        targets: for each of them a paragraph whose continuation is to follow its prefix.
        control: paragraphs to keep.
        fraction: how many of the candidate weights may change.
        mask: see `unlearn`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        kl_budget: nats/token of KL that the held-out controls may show; None: no limit.
        curvature: `control_curvature` of these controls and this seed, where it serves several
            edits of one model.
        seed: of the controls' draws, the curvature's labels and random masks.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        An `Edit`; its history has also `em_new`, the recited tokens of the new continuations.

    Raises:
        InputError: as `unlearn`, or if `targets` do not match `memorized` in number and lengths.
    """
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    targets = Paragraphs.of(targets, model, "targets")
    if targets.ids.shape != memorized.ids.shape or targets.n_prefix != memorized.n_prefix:
        raise InputError("targets", repr(targets), f"give one for each of {memorized!r}, as long")
    if (targets.continuation == memorized.continuation).all(-1).any():
        raise InputError("targets", "one continues as memorized", "give another continuation")
    new = Paragraphs(
        torch.cat([memorized.prefix, targets.continuation], 1), memorized.n_prefix, memorized.names
    )
    adapter.check_tokens(new.ids, "targets")
    return _find(
        adapter,
        memorized,
        new,
        Paragraphs.of(control, model, "control"),
        Candidates.of(adapter, heads=heads, layers=layers, components=components),
        fraction=fraction,
        how=mask,
        recipe=recipe,
        em_below=0.0,
        kl_budget=kl_budget,
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )


def control_curvature(
    model: Any,
    control: Any,
    *,
    draws: int = NATURAL_GRADIENT.draws,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Curvature:
    """The curvature that `unlearn` and `edit` take of these controls, for more than one edit.

    It keeps the sampled gradients of all weights, in two bytes each, where they fit into memory.

    Args:
        model: HookedTransformer or TransformerBridge.
        control: the paragraphs that `unlearn` will be given.
        draws: labels drawn for each position.
        seed: the seed that `unlearn` will be given.
        memory_budget: bytes that one batch may take.
    """
    adapter = adapt(model)
    control = Paragraphs.of(control, model, "control")
    adapter.check_tokens(control.ids, "control")
    return Curvature.of(
        adapter,
        _split(control, seed)[0],
        adapter.weights(),
        draws=draws,
        seed=seed,
        memory_budget=memory_budget,
        keep=True,
    )


def _split(control: Paragraphs, seed: int) -> tuple[Paragraphs, Paragraphs]:
    """The controls that the optimisation sees, and those held out from it."""
    if len(control) < 2:
        raise InputError("control", "one paragraph", "one is held out: give at least two")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(control), generator=generator)[:MAX_CONTROL]
    held = max(1, len(order) // 5)
    return control[order[held:]], control[order[:held]]


def _find(
    adapter: Adapter,
    memorized: Paragraphs,
    new: Paragraphs | None,
    control: Paragraphs,
    candidates: Candidates,
    *,
    fraction: float,
    how: str,
    recipe: Recipe,
    em_below: float,
    kl_budget: float | None,
    curvature: Curvature | None,
    seed: int,
    memory_budget: int | None,
    progress: bool,
) -> Edit:
    """What `unlearn` and `edit` share: mask, steps, restoring and the report."""
    check_fraction("fraction", fraction)
    one_of("mask", how, CHOICES)
    at_least("seed", seed, 0)
    if kl_budget is not None:
        positive("kl_budget", kl_budget)
    if not isinstance(recipe, Recipe):
        raise InputError("recipe", repr(recipe), "pass a Recipe, such as NATURAL_GRADIENT")
    at_least("steps", recipe.steps, 1)
    at_least("draws", recipe.draws, 1)
    one_of("objective", recipe.objective, OBJECTIVES)
    one_of("curvature", recipe.curvature, CURVATURES)
    adapter.check_tokens(memorized.ids, "memorized")
    adapter.check_tokens(control.ids, "control")
    refuse_overlap(memorized, control, same="prefix")
    for name, group in {"memorized": memorized, "targets": new, "control": control}.items():
        if group is None:
            continue
        if not has_finite_scores(adapter, group, name, memory_budget).all():
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )
    seen, held = _split(control, seed)
    provenance = Provenance.of(
        adapter,
        {"memorized": memorized, "targets": new, "control": control},
        fraction=fraction,
        mask=how,
        recipe=asdict(recipe),
        em_below=em_below,
        kl_budget=kl_budget,
        seed=seed,
    )
    fingerprint = provenance.model["fingerprint"]
    # What is forgotten stays so in the turns of others; what is to be recited does not. And where
    # no EM is low enough, nothing but the budget would end the first target's turn.
    in_turns = recipe.one_by_one and len(memorized) > 1 and new is None and em_below > 0
    if recipe.curvature == "none" and not recipe.curved_mask:
        curvature = None
    elif curvature is None:
        curvature = Curvature.of(
            adapter,
            seen,
            candidates.weights,
            draws=recipe.draws,
            seed=seed,
            memory_budget=memory_budget,
        )
    elif (curvature.fingerprint, curvature.control.hash) != (fingerprint, seen.hash):
        raise InputError(
            "curvature", "of other weights, controls or seed", "make it of those given here"
        )
    targets = Targets(adapter, memorized, new, recipe.objective, em_below, memory_budget)
    with contextlib.ExitStack() as undo:
        editor = Editor(
            adapter=adapter,
            candidates=candidates,
            fraction=fraction,
            how=how,
            seen=ReferenceDistribution.of(adapter, seen, memory_budget)
            if recipe.curvature == "none"
            else None,
            held=ReferenceDistribution.of(adapter, held, memory_budget),
            curvature=curvature,
            recipe=recipe,
            kl_budget=math.inf if kl_budget is None else kl_budget,
            generator=torch.Generator().manual_seed(seed),
            memory_budget=memory_budget,
            undo=undo,
        )
        found = editor.one_by_one if in_turns else editor.together
        mask, report = found(targets, progress)
        after = mask.read()
    if adapter.fingerprint() != fingerprint:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Edit.of(mask, mask.read(), after, provenance, **report)
