"""Work in batches that fit into memory, on every device.

The size of a batch comes from a budget of bytes and an estimate of what one row of a forward pass
holds. If the estimate was too optimistic, the batch that ran out of memory is halved, and only that
batch is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from memcircuits.base.errors import at_least
from memcircuits.models.adapter import Adapter

CPU_BATCH = 256 * 2**20
"""Maximum bytes per batch on CPUs, all layers together."""

CPU_LAYER = 64 * 2**20
"""Maximum bytes of one layer in a batch on CPUs: larger tensors leave the caches, and the system
allocates each of them anew."""

CPU_LOGITS = 32 * 2**20
"""Maximum bytes of logits that are made and read at once on CPUs."""

Result = TypeVar("Result")


def rows_that_fit(
    adapter: Adapter,
    n_pos: int,
    n_logits: int,
    memory_budget: int | None = None,
    *,
    backward: bool = False,
) -> int:
    """Number of rows of `n_pos` tokens, unembedded at `n_logits` positions, that fit the budget.

    Args:
        adapter: the model.
        n_pos: tokens per row.
        n_logits: positions unembedded per row.
        memory_budget: maximum bytes per batch; by default a third of the free memory, on CPUs at
            most 64 MiB of one layer's tensors and 256 MiB in all.
        backward: whether a backward pass follows, which needs the activations of all layers.

    Raises:
        InputError: if the budget is not a positive integer of bytes.
    """
    if memory_budget is not None:
        at_least("memory_budget", memory_budget, 1)
    d_mlp = getattr(adapter.model.cfg, "d_mlp", None) or 4 * adapter.d_model
    size = torch.finfo(adapter.dtype).bits // 8
    residual = n_pos * (6 * adapter.d_model + 3 * d_mlp) * size
    attention = 3 * adapter.n_heads * n_pos * n_pos * 4
    layer = residual + attention
    row = layer * (adapter.n_layers if backward else 1) + _logit_bytes(adapter, n_logits)
    if memory_budget is not None:
        return max(1, memory_budget // row)
    rows = default_budget(adapter.device) // row
    if adapter.device.type == "cpu":
        rows = min(rows, CPU_LAYER // layer)
    return max(1, rows)


def logits_that_fit(adapter: Adapter, n_logits: int, memory_budget: int | None = None) -> int:
    """Number of rows, unembedded at `n_logits` positions, whose logits are made and read at once.

    On CPUs at most 32 MiB of logits: larger blocks are allocated by the system every time, which
    costs more than reading them.
    """
    budget = memory_budget if memory_budget is not None else default_budget(adapter.device)
    if adapter.device.type == "cpu":
        budget = min(budget, 3 * CPU_LOGITS)
    return max(1, budget // _logit_bytes(adapter, n_logits))


def _logit_bytes(adapter: Adapter, n_logits: int) -> int:
    """Bytes of one row's logits, of their log-softmax and of one more copy, in float32."""
    return 3 * n_logits * adapter.d_vocab * 4


def default_budget(device: torch.device) -> int:
    """A third of the free memory of `device`, in bytes; on CPUs at most 256 MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 3
    return min(free_memory() // 3, CPU_BATCH)


def free_memory() -> int:
    """Free bytes of the computer's memory, including what the system uses as a cache."""
    return int(psutil.virtual_memory().available)


def map_batches(
    n: int, size: int, work: Callable[[slice], Tensor], done: Callable[[int], None] | None = None
) -> Tensor:
    """Concatenate `work(batch)` over batches of `range(n)`, halving a batch that does not fit.

    Args:
        n: number of rows.
        size: maximum number of rows per batch.
        work: from the rows of a batch to a tensor whose first axis they are.
        done: called after every batch with its number of rows, for a progress bar.

    Raises:
        MemoryError: if even one row does not fit, with advice.
    """
    results = []
    for batch, result in iter_batches(n, size, work):
        results.append(result)
        if done:
            done(batch.stop - batch.start)
    return torch.cat(results)


def iter_batches(
    n: int, size: int, work: Callable[[slice], Result]
) -> Iterator[tuple[slice, Result]]:
    """Batches of `range(n)` and `work(batch)`, halving a batch that does not fit.

    `work` must have no effect before it returns: a batch that ran out of memory is done again in
    halves. One of a single row is done again once, as the memory of the failed attempt is free by
    then.

    Raises:
        MemoryError: if even one row does not fit, with advice.
    """
    start, failed_before = 0, False
    while start < n:
        batch = slice(start, min(n, start + size))
        rows = batch.stop - batch.start
        results = []
        try:
            results.append(work(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if failed_before and rows == 1:
                raise MemoryError(
                    "one paragraph does not fit into memory: use shorter paragraphs, a smaller "
                    "dtype or another device"
                ) from error
        # Outside the handler: the traceback no longer holds the tensors that filled the memory.
        if results:
            yield batch, results[0]
            start, failed_before = batch.stop, False
        else:
            size, failed_before = max(1, rows // 2), rows == 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    return any(phrase in text.lower() for phrase in phrases) or _accelerate_says_so(error)


def _accelerate_says_so(error: BaseException) -> bool:
    """Whether accelerate, which knows the messages of more devices, would reduce the batch size."""
    try:
        from accelerate.utils.memory import should_reduce_batch_size
    except ImportError:  # it comes with TransformerLens, but is not a dependency of ours
        return False
    message = error.args[0] if len(error.args) == 1 else None
    return (
        isinstance(error, Exception)
        and isinstance(message, str)
        and bool(should_reduce_batch_size(error))
    )
