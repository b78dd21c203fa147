"""How a sparse edit is optimised: recipes, and the options that `unlearn` and `edit` share.

`DEEP`, the default, trains the model to answer from every entry like one that never saw the text
(`memcircuits.editing.deep_objective`): Adam on all weights of the blocks in whitened coordinates
(`memcircuits.editing.whitening`), the learning rate falling to 0 as a cosine.

`STOEHR_2024` is the recipe of arXiv 2403.19851, equation 3: the forgetting term is 0.1 times the
log-likelihood of the continuation, the KL of the controls is summed over the positions, and Adam
follows the gradient of the sum. (Here both terms are means per token, which gives `kl_weight`.)

`NATURAL_GRADIENT`, which `depth="surface"` stands for, differs from it in four points:

* *Objective.* It lowers the expected number of tokens that are recited when sampling,
  sum over k of p_1 ... p_k, as log(1 + .). The log-likelihood of all the tokens has no lower bound
  and also pushes down tokens that sampling never reaches. A paragraph that is already forgotten
  contributes nothing.
* *Curvature.* The cost for the controls is the quadratic model of `memcircuits.editing.curvature`.
  Adam changes every masked weight by about the same amount and lets the KL term pull it back. A
  natural-gradient step F^-1 g is the change that forgets most for its KL; its length is `step_kl`.
  The mask takes the weights that gain most for their KL.
* *Scaling back.* At the end the change is scaled back as far as the targets stay forgotten.
* *One by one.* Each of several targets has a mask and steps of its own, starting from the weights
  that the earlier targets changed, until all are forgotten. For a step that changes the
  continuation of forty paragraphs at once the quadratic model underestimates the KL by far. The
  mask of the edit is the union of the targets' masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from memcircuits.base.errors import InputError, at_least, fraction, one_of, positive
from memcircuits.base.heads import HeadLike
from memcircuits.editing.masks import MaskStrategy

if TYPE_CHECKING:
    from memcircuits.editing.curvature import Curvature

ForgettingTerm = Literal["nll", "npo", "margin", "recitation", "reference"]
Depth = Literal["deep", "surface"]
"""What `unlearn` does: forget the text from every entry, or only stop its recitation."""
CurvatureKind = Literal["none", "inputs", "diagonal", "full"]


@dataclass(frozen=True)
class Recipe:
    """How to optimise.

    Attributes:
        steps: maximum number of steps.
        objective: the forgetting term, a mean over paragraphs. `nll`: the mean log-likelihood of
            the tokens. `npo`: negative preference optimization (Zhang et al. 2024, equation 3),
            2 / beta log(1 + (p / p of the unedited model)^beta) of the whole continuation, per
            token, beta = 0.1. `margin`: the mean over tokens of max(0, 1 + margin), the margin
            being the token's logit minus the largest other logit. `recitation`: log(1 + the
            expected number of tokens recited when sampling); `edit` uses `margin` in its place.
            `reference`: the KL from a model that never saw the text, which only `unlearn` can use.
        curvature: `none`: Adam on forgetting + kl_weight * KL. `inputs`: the same in coordinates
            that the inputs of the controls whiten (`memcircuits.editing.whitening`). `full`:
            natural-gradient steps by the quadratic model of the KL; `diagonal`: by its diagonal
            only.
        curved_mask: divide the mask's scores by the root of the Fisher information.
        step_kl: length of a step, as the KL that the quadratic model predicts, nats/token; the
            length is halved after a step that increased the loss.
        draws: labels drawn for each position of the controls, for the curvature.
        shrink: scale the result back as far as the targets stay forgotten.
        one_by_one: forget several targets one after another, each with a mask of its own (`edit`
            and `em_below=0` take all at once).
        learning_rate: of Adam, in units of weight.
        kl_weight: of the KL (nats/token) beside the forgetting term, with Adam.
        token_weight: in the forgetting term `reference`, of the distance of the true tokens'
            log-probabilities from the reference's.
        control_batch: controls in each step of Adam.
        decay: let the learning rate of Adam fall to 0 as a cosine.
    """

    steps: int = 10
    objective: ForgettingTerm = "nll"
    curvature: CurvatureKind = "none"
    curved_mask: bool = False
    step_kl: float = 3e-5
    draws: int = 4
    shrink: bool = False
    one_by_one: bool = False
    learning_rate: float = 1e-5
    kl_weight: float = 500.0
    token_weight: float = 0.0
    control_batch: int = 10
    decay: bool = False

    @property
    def needs_curvature(self) -> bool:
        """Whether the mask or the steps use the Fisher information of the controls."""
        return self.curved_mask or not self.takes_adam

    @property
    def takes_adam(self) -> bool:
        """Whether the steps are those of Adam, with a KL term beside the forgetting term."""
        return self.curvature in ("none", "inputs")


STOEHR_2024 = Recipe()

DEEP = Recipe(
    steps=40,
    objective="reference",
    curvature="inputs",
    learning_rate=1e-4,
    kl_weight=400.0,
    token_weight=1.0,
    control_batch=8,
    decay=True,
)

NATURAL_GRADIENT = Recipe(
    steps=50,
    objective="recitation",
    curvature="full",
    curved_mask=True,
    shrink=True,
    one_by_one=True,
)


RECIPES: Mapping[Depth, Recipe] = {"deep": DEEP, "surface": NATURAL_GRADIENT}
"""The recipe of each depth."""


@dataclass(frozen=True)
class EditOptions:
    """The keyword options of `unlearn` and `edit`, checked; `unlearn` documents each.

    Raises:
        InputError: for an option outside its range.
    """

    fraction: float
    mask: MaskStrategy
    heads: Sequence[HeadLike] | None
    layers: Sequence[int] | None
    components: Sequence[str] | None
    recipe: Recipe
    em_below: float
    kl_budget: float | None
    curvature: Curvature | None
    seed: int
    memory_budget: int | None
    progress: bool

    def __post_init__(self) -> None:
        fraction("fraction", self.fraction)
        one_of("mask", self.mask, get_args(MaskStrategy))
        at_least("seed", self.seed, 0)
        if self.kl_budget is not None:
            positive("kl_budget", self.kl_budget)
        if not isinstance(self.recipe, Recipe):
            raise InputError("recipe", repr(self.recipe), "pass a Recipe, such as NATURAL_GRADIENT")
        at_least("steps", self.recipe.steps, 1)
        at_least("draws", self.recipe.draws, 1)
        one_of("objective", self.recipe.objective, get_args(ForgettingTerm))
        one_of("curvature", self.recipe.curvature, get_args(CurvatureKind))
        if self.recipe.objective == "reference" and self.recipe.needs_curvature:
            raise InputError(
                "recipe", "reference with a curvature", 'this objective takes Adam: use "inputs"'
            )
