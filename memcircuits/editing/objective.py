"""What a search minimises: the interface between an objective and `optimization.search`.

An objective measures the weights that are in the model now. `unlearning_objective` has the one of
`unlearn` and `edit`, `planting_objective` the one of `plant`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from memcircuits.editing.masks import Mask


@dataclass(frozen=True)
class Evaluation:
    """What the weights that are in the model now do.

    Attributes:
        row: the row of the history: measure -> value; `kl` is NaN where it was not measured.
        loss: the value of the objective's first term, nats or nats/token.
        gradient: its gradient in the masked weights; zeros if it was not asked for.
        finite: whether all numbers that the search relies on are finite.
        reached: whether every target does what it should.
        rejected: whether the KL is over the budget, so that the search must go back.
        done: whether the search ends if this change is not rejected.
    """

    row: Mapping[str, float]
    loss: float
    gradient: Float[Tensor, " weight"]
    finite: bool
    reached: bool
    rejected: bool
    done: bool


class Objective(ABC):
    """What a search minimises in the weights of a mask."""

    @abstractmethod
    def evaluate(self, mask: Mask, *, last: bool, gradient: bool = True) -> Evaluation:
        """Measure the weights as they are.

        Args:
            mask: the weights to take the gradient in.
            last: whether the search can make no further step.
            gradient: take the gradient.
        """

    def full_gradient(self, mask: Mask, evaluation: Evaluation) -> Float[Tensor, " weight"]:
        """The gradient that the next step follows, at the weights as they are."""
        return evaluation.gradient

    @abstractmethod
    def prefers(self, new: Evaluation, best: Evaluation | None) -> bool:
        """Whether a change that is not rejected replaces the best one so far."""
