"""Checks of token ids that a caller gives: rows of paragraphs, and tokens in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least

_MAX_ID = 2**31


def plain_ids(ids: Any, n_prefix: int) -> Int[Tensor, "paragraph pos"]:
    """Ids of paragraphs as 64-bit integers on the CPU.

    Raises:
        InputError: unless they are integers [paragraph, pos], none negative, of one paragraph at
            least and longer than the prefix.
    """
    _check_ids(ids)
    at_least("n_prefix", n_prefix, 1)
    length = ids.shape[1]
    if length <= n_prefix:
        raise InputError(
            "paragraphs",
            f"{length} tokens each",
            f"they must be longer than n_prefix={n_prefix}; use longer texts or a smaller n_prefix",
        )
    if int(ids.min()) < 0:
        raise InputError("ids", int(ids.min()), "token ids cannot be negative")
    plain = ids.detach().to("cpu", torch.long)
    if plain.is_inference():  # gradients need tensors from outside `torch.inference_mode()`
        with torch.inference_mode(False):
            plain = plain.clone()
    return plain


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError("ids", shape, "give an integer tensor [paragraph, pos]")
    if ids.dtype == torch.bool:
        raise InputError("ids", "bool", "give an integer tensor [paragraph, pos]")
    if not len(ids):
        raise InputError("paragraphs", "none", "give at least one paragraph")


def check_bos_ids(bos: Any) -> tuple[int, ...]:
    """The ids of tokens in front as a tuple.

    Raises:
        InputError: unless they are a sequence of token ids.
    """
    if isinstance(bos, Tensor) and bos.ndim == 1:
        bos = bos.tolist()
    if not isinstance(bos, (list, tuple)) or not all(_is_id(token) for token in bos):
        raise InputError("bos", repr(bos), "give the token ids in front, such as bos=(1,)")
    return tuple(bos)


def ids_from_rows(rows: Sequence[Sequence[int]]) -> Int[Tensor, "paragraph pos"]:
    """Rows of token ids as a tensor, if they are equally long and hold token ids."""
    if not all(hasattr(row, "__len__") for row in rows):
        raise InputError("ids", repr(rows)[:60], "give rows of token ids")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InputError(
            "ids", f"rows of {sorted(lengths)[:5]} tokens", "all rows must be equally long"
        )
    if not all(_is_id(token) for row in rows for token in row):
        raise InputError("ids", repr(rows)[:60], "rows must hold token ids")
    (length,) = lengths
    return torch.tensor([list(row) for row in rows], dtype=torch.long).reshape(len(rows), length)


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < _MAX_ID
