"""Unlearning and editing: change weights so that paragraphs are no longer recited.

The method is that of arXiv 2403.19851, section 5, with further recipes:

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

from collections.abc import Sequence
from typing import get_args

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.heads import HeadLike
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import refuse_other_tokenizer
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.edit import Edit
from memcircuits.editing.find_edit import budget, find_edit
from memcircuits.editing.masks import MaskStrategy
from memcircuits.editing.recipe import RECIPES, Depth, EditOptions, Recipe
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt


@plain_torch()
def unlearn(  # noqa: PLR0913
    model: Model,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    depth: Depth = "deep",
    twin: Model | None = None,
    fraction: float | None = None,
    mask: MaskStrategy = "top",
    heads: Sequence[HeadLike] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    em_below: float | None = None,
    kl_budget: float | None = None,
    curvature: Curvature | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Edit:
    """Find a change of weights after which `memorized` are no longer recited.

    The model is unchanged when this returns; use `Edit.apply`. `depth="deep"` makes the model
    answer, from the paragraphs' own prefixes and from attacked ones, like a model that never saw
    them. `depth="surface"` changes few weights, and mostly blocks the first
    tokens: the text comes back from other entries.

    Args:
        model: the model.
        memorized: paragraphs to forget: `Paragraphs`, a list of strings or ids.
        control: paragraphs to keep, at least two; at most 80 are drawn. Every fifth is held out
            from the objective, to measure the KL. What else the model recites is kept better if
            some of it is among them.
        depth: see above.
        twin: of `deep`, a model of the same tokenizer that was not trained on `memorized`; without
            one, a stand-in is made of the model itself (`memcircuits.editing.references`).
        fraction: fraction of the candidate weights that may change, for each target if the recipe
            takes targets one by one. Candidates are the matrices of the blocks, or those asked for.
            By default 1 for `deep` and 0.001 for `surface`.
        mask: `top` fraction by score, or `top-per-component`, the same fraction of each component;
            for comparison `random`, `random-per-tensor` (as many in each matrix as `top` takes) or
            `all`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise; by default `DEEP` or `NATURAL_GRADIENT`, by the depth.
        em_below: `surface` stops when fewer tokens of every target are recited (0: never), and
            `deep` says in `Edit.stopped` whether fewer are; by default a tenth of the continuation.
        kl_budget: maximum KL on the held-out controls, nats/token; by default 0.002 for `surface`
            and no limit for `deep`, whose steps bring the KL down again. `math.inf`: no limit.
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
    one_of("depth", depth, get_args(Depth))
    recipe = RECIPES[depth] if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise InputError("recipe", repr(recipe), "pass a Recipe, such as NATURAL_GRADIENT")
    is_deep = recipe.objective == "reference"
    options = EditOptions(
        fraction=(1.0 if is_deep else 0.001) if fraction is None else fraction,
        mask=mask,
        heads=heads,
        layers=layers,
        components=components,
        recipe=recipe,
        em_below=memorized.n_continuation / 10 if em_below is None else em_below,
        kl_budget=budget(kl_budget, None if is_deep else 0.002),
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )
    checked_twin = _check_twin(twin, adapter, is_deep)
    return find_edit(adapter, memorized, None, control, options, checked_twin)


def _check_twin(twin: Model | None, adapter: Adapter, is_deep: bool) -> Adapter | None:
    """The twin's adapter.

    Raises:
        InputError: for a twin of another tokenizer, or one that the recipe has no use for.
    """
    if twin is None:
        return None
    if not is_deep:
        raise InputError("twin", "given", 'only depth="deep" has a use for it')
    adapted = adapt(twin)
    refuse_other_tokenizer("twin", adapter.model, adapted.model)
    return adapted
