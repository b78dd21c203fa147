"""TODO."""

from __future__ import annotations

from torch import Tensor

KeysValues = list[tuple[Tensor, Tensor]]
