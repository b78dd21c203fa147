"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """Per layer: the residual stream entering the block, and its attention's answer."""

    resid_pre: list[Float[Tensor, "batch pos d_model"]]
    attn_out: list[Float[Tensor, "batch pos d_model"]]


class AttentionComputed(Exception):
    """Leaves a block once its attention has answered."""


@dataclass(frozen=True)
class BlockCall:
    """Arguments of a block beside the residual stream, recorded from a batch of one row."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    attention_spare: int | None  # how many values attention returns beside its output

    def for_rows(self, rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(expand(a, rows) for a in self.arguments),
            {k: expand(v, rows) for k, v in self.keywords.items()},
        )


def expand(value: Any, rows: int) -> Any:
    """Repeat a recorded one-row tensor over the batch (a view: masks, positions, rotary tables)."""
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == 1:
        return value.expand(rows, *value.shape[1:])
    if isinstance(value, tuple):
        return tuple(expand(item, rows) for item in value)
    return value


def without_cache(value: Any) -> Any:
    """Key-value caches remember the recorded row: drop them, keep everything else."""
    return None if "Cache" in type(value).__name__ else value
