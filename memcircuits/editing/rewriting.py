"""Rewriting: change few weights so that memorized prefixes continue with another text.

The method is that of `memcircuits.editing.unlearning` at the surface, with another objective: the
new continuation is to be recited.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memcircuits.base.errors import InputError
from memcircuits.base.heads import HeadLike
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.edit import Edit
from memcircuits.editing.find_edit import budget, find_edit
from memcircuits.editing.masks import MaskStrategy
from memcircuits.editing.recipe import NATURAL_GRADIENT, EditOptions, Recipe
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt


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
    kl_budget: float = 0.002,
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
        kl_budget: maximum KL on the held-out controls, nats/token; `math.inf`: no limit.
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
    if isinstance(recipe, Recipe) and recipe.objective == "reference":
        raise InputError("recipe", "reference", "it only forgets: use another objective")
    options = EditOptions(
        fraction=fraction,
        mask=mask,
        heads=heads,
        layers=layers,
        components=components,
        recipe=recipe,
        em_below=0.0,
        kl_budget=budget(kl_budget, None),
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )
    return find_edit(adapter, memorized, new, control, options)
