"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

HEAD_SITES = ("q", "k", "v", "z")


Edit = Callable[[Tensor], Tensor]


def hook_z(layer: int) -> str:
    """Name of the per-head attention output, [row, pos, head, d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def hook_pattern(layer: int) -> str:
    """Name of the attention pattern, [row, head, query, key]."""
    return f"blocks.{layer}.attn.hook_pattern"


def editing_hooks(edit: Mapping[str, Edit] | None) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks that replace activations."""

    def change(function: Edit) -> Callable[..., Tensor]:
        return lambda tensor, hook=None: function(tensor)

    return [(name, change(function)) for name, function in (edit or {}).items()]
