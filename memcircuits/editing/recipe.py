"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTIVES = ("nll", "margin", "recitation")


CURVATURES = ("none", "diagonal", "full")


@dataclass(frozen=True)
class Recipe:
    """How to optimise.

    Attributes:
        steps: steps at most.
        objective: the forgetting term, a mean over paragraphs. `nll`: the mean log-likelihood of
            the tokens. `margin`: the mean over tokens of max(0, 1 + margin), the margin of a
            token's logit over the next best. `recitation`: log(1 + the expected number of tokens
            recited when sampling) (`edit` takes `margin` for it).
        curvature: `none`: Adam on forgetting + kl_weight * KL. `full`: steps by the quadratic model
            of the KL; `diagonal`: by its diagonal alone.
        curved_mask: divide the mask's scores by the root of the Fisher information.
        step_kl: length of a step, as the KL that the model gives it, nats/token; the length is
            halved after a step that went too far.
        draws: labels drawn for each position of the controls, for the curvature.
        shrink: scale the result back as far as the targets stay forgotten.
        one_by_one: forget several targets one after another, each with a mask of its own (`edit`
            and `em_below=0` take all at once).
        learning_rate: of Adam, in units of weight.
        kl_weight: of the KL (nats/token) beside the forgetting term, with Adam.
        control_batch: controls in each step of Adam.
    """

    steps: int = 10
    objective: str = "nll"
    curvature: str = "none"
    curved_mask: bool = False
    step_kl: float = 3e-5
    draws: int = 4
    shrink: bool = False
    one_by_one: bool = False
    learning_rate: float = 1e-5
    kl_weight: float = 500.0
    control_batch: int = 10


STOEHR_2024 = Recipe()


NATURAL_GRADIENT = Recipe(
    steps=50,
    objective="recitation",
    curvature="full",
    curved_mask=True,
    shrink=True,
    one_by_one=True,
)
