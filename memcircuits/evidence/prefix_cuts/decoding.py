"""How many bytes of a true text does greedy decoding write, whatever tokens it writes them in?

Exact match counts tokens. After a prefix that was cut inside a token, the model may write the true
text in other tokens than the corpus has, so here its bytes are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.token_bytes import TokenBytes
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit

_FIRST, _FURTHER = 4, 32  # tokens decoded before they are compared: most errors come at once


@dataclass(frozen=True)
class Start:
    """Where decoding begins.

    Attributes:
        ids: tokens given to the model.
        ahead: bytes that `ids` spell beyond the cut.
        following: the true text after the cut.
    """

    ids: tuple[int, ...]
    ahead: bytes
    following: bytes


def recited_bytes(
    adapter: Adapter,
    table: TokenBytes,
    starts: Iterable[Start],
    memory_budget: int | None,
    done: Callable[[int], None],
) -> dict[Start, int]:
    """Bytes of the true text that each start is followed by, up to the first wrong one.

    Args:
        adapter: the model.
        table: bytes of its tokens.
        starts: where decoding begins.
        memory_budget: maximum bytes per batch.
        done: called with the number of starts that are finished.

    Raises:
        InputError: if the model's context ends while the text is still recited.
    """
    recited: dict[Start, int] = {}
    unfinished = {start: (start.ids, start.ahead) for start in dict.fromkeys(starts)}
    n_tokens = _FIRST
    while unfinished:
        continued = {}
        for start, (ids, text) in unfinished.items():
            n_equal = shared_length(text, start.following)
            if n_equal < len(text) or n_equal == len(start.following):
                recited[start] = n_equal
            elif len(ids) < adapter.n_ctx:
                continued[start] = ids, text
            else:
                limit = f"the model's context is {adapter.n_ctx} tokens: give shorter ones"
                raise InputError("paragraphs", "a text longer than the context", limit)
        done(len(unfinished) - len(continued))
        rows = [ids for ids, _ in continued.values()]
        decoded = _decode(adapter, rows, n_tokens, memory_budget)
        n_tokens = _FURTHER
        unfinished = {
            start: (ids + decoded[ids], text + b"".join(table.bytes_of(i) for i in decoded[ids]))
            for start, (ids, text) in continued.items()
        }
    return recited


def shared_length(one: bytes, other: bytes) -> int:
    """Number of bytes that two texts begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def next_log_probs(
    adapter: Adapter, rows: Iterable[tuple[int, ...]], memory_budget: int | None
) -> Iterator[tuple[tuple[int, ...], Float[Tensor, " d_vocab"]]]:
    """Each row of tokens and the log-probabilities (nats) of the token after it, on the CPU."""
    for length, same_length in _by_length(rows).items():
        size = rows_that_fit(adapter, length, 1, memory_budget)
        work = partial(_log_probs_of, adapter, torch.tensor(same_length))
        yield from zip(same_length, map_batches(len(same_length), size, work), strict=True)


def _log_probs_of(
    adapter: Adapter, ids: Int[Tensor, "row pos"], batch: slice
) -> Float[Tensor, "batch d_vocab"]:
    logits = adapter.run(ids[batch], positions=slice(-1, None)).logits[:, -1]
    return logits.float().log_softmax(-1).cpu()


def _decode(
    adapter: Adapter, rows: Iterable[tuple[int, ...]], n_tokens: int, memory_budget: int | None
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The next tokens of each row, each the most likely one, as far as the context reaches."""
    decoded: dict[tuple[int, ...], tuple[int, ...]] = {}
    for length, same_length in _by_length(rows).items():
        n = min(n_tokens, adapter.n_ctx - length)
        size = rows_that_fit(adapter, length + n, 1, memory_budget)
        work = partial(_next_tokens, adapter, torch.tensor(same_length), n)
        tokens = map_batches(len(same_length), size, work)
        decoded |= dict(zip(same_length, map(tuple, tokens.tolist()), strict=True))
    return decoded


def _next_tokens(
    adapter: Adapter, ids: Int[Tensor, "row pos"], n: int, batch: slice
) -> Int[Tensor, "batch continuation"]:
    if adapter.supports_prefix_cache(ids.shape[1]):
        return adapter.decode(ids[batch], n).cpu()
    written = ids[batch]
    for _ in range(n):
        logits = adapter.run(written, positions=slice(-1, None)).logits
        written = torch.cat([written, logits[:, -1:].argmax(-1).cpu()], 1)
    return written[:, -n:]


def _by_length(rows: Iterable[tuple[int, ...]]) -> dict[int, list[tuple[int, ...]]]:
    """Different rows, grouped by their number of tokens."""
    groups = defaultdict(list)
    for row in dict.fromkeys(rows):
        groups[len(row)].append(row)
    return groups
