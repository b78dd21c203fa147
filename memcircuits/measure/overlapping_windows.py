"""Overlapping windows of one document: a list names the best of them, a count counts places.

With a small stride one recited passage is recited in many windows. Two windows are of one place if
their names are those of one document (`memcircuits.data.windows`), the continuation of one begins
within that of the other or directly behind it, and the tokens that they share are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int
from torch import Tensor

from memcircuits.data.groups import window_place

Ids = Int[Tensor, "window pos"] | Int[np.ndarray, "window pos"]


def best_apart(
    names: Sequence[str],
    ids: Ids,
    n_continuation: int,
    ordered: Iterable[int],
    n: int,
) -> list[int]:
    """The first `n` windows of which none is of the place of a better one.

    Args:
        names: the windows' names.
        ids: their token ids.
        n_continuation: tokens of a continuation.
        ordered: their rows, the best first.
        n: how many are asked for, at most.
    """
    kept: list[int] = []
    of_document: dict[str, list[tuple[int, int]]] = {}
    for row in ordered:
        if len(kept) == n:
            break
        document, start = _place(names[row])
        better = of_document.setdefault(document, [])
        if any(_one_place(ids, (start, row), other, n_continuation) for other in better):
            continue
        better.append((start, row))
        kept.append(row)
    return kept


def count_places(
    names: Sequence[str],
    ids: Ids,
    n_continuation: int,
    rows: Iterable[int],
) -> int:
    """How many places the windows of some rows make; windows without a gap are one place."""
    windows = sorted((*_place(names[row]), row) for row in rows)
    n = len(windows)
    for window, following in pairwise(windows):
        if window[0] == following[0]:
            n -= _one_place(ids, window[1:], following[1:], n_continuation)
    return n


def are_windows(names: Iterable[str]) -> bool:
    """Whether some names say that a paragraph is a window within a document."""
    return any(window_place(name)[1] is not None for name in names)


def _place(name: str) -> tuple[str, int]:
    """A document and the first token there; text that is no window is its own document."""
    document, start = window_place(name)
    return document, start or 0


def _one_place(
    ids: Ids,
    window: tuple[int, int],
    other: tuple[int, int],
    n_continuation: int,
) -> bool:
    (start, row), (other_start, other_row) = sorted((window, other))
    distance = other_start - start
    if distance > n_continuation:
        return False
    shared = ids.shape[1] - distance
    return bool(np.array_equal(ids[row, distance:], ids[other_row, :shared]))
