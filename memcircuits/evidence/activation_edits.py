"""Edits of activations that `memcircuits.evidence.interventions` carries out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Int
from torch import Tensor

RowsEdit: TypeAlias = Callable[[Tensor, Int[Tensor, " batch"]], Tensor]
"""From an activation and the indices of its paragraphs to the activation's replacement."""


@dataclass(frozen=True)
class HeadEdit:
    """Replace the z of some heads of one layer.

    Attributes:
        heads: indices of the heads within the layer.
        z: their new values, [batch, pos, head, d_head]; a size of 1 broadcasts over paragraphs or
            positions.
        w_o: the matrices that read them, [head, d_head, d_model]; by default the model's own.
    """

    heads: tuple[int, ...]
    z: Tensor
    w_o: Tensor | None = None
