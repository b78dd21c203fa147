"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

HEAD_COMPONENTS = ("W_Q", "W_K", "W_V", "W_O")


MLP_COMPONENTS = ("W_in", "W_out")


@dataclass(frozen=True)
class Weight:
    """One weight matrix of one layer, seen the same way in every architecture.

    Attributes:
        layer: index of the block.
        component: `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_out` or (gated MLPs) `W_gate`.
        parameter: the leaf parameter that holds it; may hold other heads too.
        split: maps a tensor of the parameter's shape (values or gradient) to a view
            `[head, d_in, d_out]`; MLP matrices have a single "head".
        module: the Linear or Conv1D that applies it and nothing else; None where there is none.
    """

    layer: int
    component: str
    parameter: nn.Parameter
    split: Callable[[Tensor], Tensor]
    module: nn.Module | None = None

    @property
    def values(self) -> Float[Tensor, "head d_in d_out"]:
        """The weights themselves, detached; writing into the view writes into the model."""
        return self.split(self.parameter.detach())
