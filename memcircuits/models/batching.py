"""Work in pieces that fit into memory, whatever the device.

Row counts come from a byte budget and an estimate of what one row of a forward pass holds; when the
estimate was too kind, the piece that ran out of memory is halved and only that piece is redone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from memcircuits.core.errors import at_least
from memcircuits.models.adapter import Adapter

_CPU_CAP = 256 * 2**20  # more rows than this are slower, not faster: they leave the caches


_CPU_LOGITS = 3 * 32 * 2**20


Part = TypeVar("Part")


def rows_that_fit(
    adapter: Adapter,
    n_pos: int,
    n_logits: int,
    memory_budget: int | None = None,
    *,
    backward: bool = False,
) -> int:
    """Rows of `n_pos` tokens, unembedded at `n_logits` positions, that fit into the budget.

    Args:
        adapter: the model.
        n_pos: tokens per row.
        n_logits: positions unembedded per row.
        memory_budget: bytes; by default a third of the free memory, on CPUs at most 256 MiB.
        backward: a backward pass follows, which needs the activations of all layers.

    Raises:
        InputError: if the budget is not a positive integer of bytes.
    """
    if memory_budget is not None:
        at_least("memory_budget", memory_budget, 1)
    d_mlp = getattr(adapter.model.cfg, "d_mlp", None) or 4 * adapter.d_model
    size = torch.finfo(adapter.dtype).bits // 8
    residual = n_pos * (6 * adapter.d_model + 3 * d_mlp) * size
    attention = 3 * adapter.n_heads * n_pos * n_pos * 4
    logits = 3 * n_logits * adapter.d_vocab * 4
    budget = memory_budget if memory_budget is not None else default_budget(adapter.device)
    layers = adapter.n_layers if backward else 1
    return max(1, budget // (layers * (residual + attention) + logits))


def logits_that_fit(adapter: Adapter, n_logits: int, memory_budget: int | None = None) -> int:
    """Rows, unembedded at `n_logits` positions, whose logits are made and read at once.

    On CPUs at most 32 MiB of them: larger blocks are fetched from the system anew every time, which
    costs more than reading them.
    """
    budget = memory_budget if memory_budget is not None else default_budget(adapter.device)
    if adapter.device.type == "cpu":
        budget = min(budget, _CPU_LOGITS)
    return max(1, budget // (3 * n_logits * adapter.d_vocab * 4))


def default_budget(device: torch.device) -> int:
    """A third of the free memory of `device`, in bytes; on CPUs at most 256 MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 3
    return min(free_memory() // 3, _CPU_CAP)


def free_memory() -> int:
    """Bytes of this machine's memory that can be had, with what the system only caches."""
    return int(psutil.virtual_memory().available)


def map_batches(
    n: int, size: int, work: Callable[[slice], Tensor], done: Callable[[int], None] | None = None
) -> Tensor:
    """Concatenate `work(piece)` over pieces of `range(n)`, halving a piece that does not fit.

    Raises:
        MemoryError: if even one row does not fit, with advice.
    """
    parts = []
    for piece, part in iter_batches(n, size, work):
        parts.append(part)
        if done:
            done(piece.stop - piece.start)
    return torch.cat(parts)


def iter_batches(n: int, size: int, work: Callable[[slice], Part]) -> Iterator[tuple[slice, Part]]:
    """Pieces of `range(n)` and `work(piece)`, halving a piece that does not fit.

    `work` must have no effect until it is through: a piece that ran out of memory is done again,
    one of a single row once, now that what the failed attempt held is free.

    Raises:
        MemoryError: if even one row does not fit, with advice.
    """
    start = 0
    again = False
    while start < n:
        piece = slice(start, min(n, start + size))
        try:
            part = [work(piece)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if again and piece.stop - piece.start == 1:
                raise MemoryError(
                    "one paragraph does not fit into memory: use shorter paragraphs, a smaller "
                    "dtype or another device"
                ) from error
            part = []
        # Outside the handler: the traceback no longer holds the tensors that filled the memory.
        if not part:
            again = piece.stop - piece.start == 1
            size = max(1, (piece.stop - piece.start) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield piece, part[0]
        start, again = piece.stop, False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
