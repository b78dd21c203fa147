"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

HEAD_SITES = ("q", "k", "v", "z")


ActivationEdit = Callable[[Tensor], Tensor]


def hook_z(layer: int) -> str:
    """Name of the per-head attention output, [batch, pos, head, d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def hook_pattern(layer: int) -> str:
    """Name of the attention pattern, [batch, head, query, key]."""
    return f"blocks.{layer}.attn.hook_pattern"


def editing_hooks(
    edit: Mapping[str, ActivationEdit] | None,
) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks that replace activations."""

    def change(function: ActivationEdit) -> Callable[..., Tensor]:
        return lambda tensor, hook=None: function(tensor)

    return [(name, change(function)) for name, function in (edit or {}).items()]
