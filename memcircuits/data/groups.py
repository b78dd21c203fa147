"""Which paragraphs depend on each other? Copies, near copies and windows of one document.

Statistics count independent evidence. A paragraph that is given twenty times is evidence of one
paragraph, and two windows of one document are recited, or not, for the same reasons. `find_groups`
puts into one group

1. what the caller says: paragraphs with the same value in the column `group`. Only paragraphs that
   have no such value are grouped by the following rules;
2. paragraphs of one document: the same value in one of the `DOCUMENT_COLUMNS`, or names that differ
   only in the place of the window, which follows an `@` (`memcircuits.data.windows`);
3. exact copies;
4. near copies: paragraphs that share at least `SIMILARITY` of their runs of `SHINGLE` tokens
   (Jaccard similarity), which two windows do that overlap by half. MinHash with banding (Broder
   1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) proposes the pairs,
   and the exact similarity decides.

Groups are transitive: overlapping windows form one chain.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

GROUP_COLUMN = "group"
"""The column in which the caller says which paragraphs depend on each other."""

DOCUMENT_COLUMNS = ("document", "document_id", "doc_id", "doc")
"""Columns that name the document of a paragraph; the first one present counts."""

SHINGLE = 5
"""Length of the runs of tokens that near copies share, tokens."""

SIMILARITY = 0.3
"""Near copies share at least this fraction of the runs of tokens that occur in either."""

# A pair of the similarity above is missed by all bands with probability (1 - 0.3^2)^64 = 0.2 %.
_BANDS, _ROWS = 64, 2

# So similar to a paragraph of the index that whatever resembles one of them resembles the other.
_INTERCHANGEABLE = 0.9

_WINDOW = re.compile(r"@(\d+)(?=(#\d+)?$)")


def window_place(name: str) -> tuple[str, int | None]:
    """The document that a name is of, and the first token of the window there.

    The token is None, and the document the name itself, if the name is not that of a window
    (`memcircuits.data.windows`).
    """
    window = _WINDOW.search(name)
    if window is None:
        return name, None
    return _WINDOW.sub("", name), int(window.group(1))


def find_groups(
    ids: Int[Tensor, "paragraph pos"],
    names: Sequence[str],
    metadata: Mapping[str, Sequence[Any]],
) -> Int[Tensor, " paragraph"]:
    """The group of each paragraph; groups are numbered in the order of their first paragraphs.

    Args:
        ids: token ids of the paragraphs.
        names: their names.
        metadata: their further columns.
    """
    parents = _Parents(len(ids))
    given = metadata.get(GROUP_COLUMN, [None] * len(ids))
    parents.join_equal((i, _key(value)) for i, value in enumerate(given) if not _missing(value))
    others = [i for i, value in enumerate(given) if _missing(value)]
    parents.join_equal((i, _document(i, names, metadata)) for i in others)
    content = ids.contiguous().numpy()
    parents.join_equal((i, content[i].tobytes()) for i in others)
    _join_near_copies(parents, content, others)
    return parents.groups()


class _Parents:
    """Disjoint sets of rows: each row points towards the first row of its set."""

    def __init__(self, n: int) -> None:
        self.parents = list(range(n))

    def root(self, row: int) -> int:
        """The first row of the set that `row` is in."""
        while self.parents[row] != row:
            self.parents[row] = self.parents[self.parents[row]]
            row = self.parents[row]
        return row

    def join(self, row: int, other: int) -> None:
        """Make one set of the sets that the two rows are in."""
        first, second = sorted((self.root(row), self.root(other)))
        self.parents[second] = first

    def join_equal(self, keyed_rows: Iterable[tuple[int, Hashable]]) -> None:
        """Join the rows that have the same key."""
        first_with: dict[Hashable, int] = {}
        for row, key in keyed_rows:
            self.join(row, first_with.setdefault(key, row))

    def groups(self) -> Int[Tensor, " paragraph"]:
        """The sets, numbered in the order of their first rows."""
        numbers: dict[int, int] = {}
        roots = [self.root(row) for row in range(len(self.parents))]
        return torch.tensor([numbers.setdefault(root, len(numbers)) for root in roots])


def _missing(value: Any) -> bool:
    # pandas has three more words for nothing; comparing them, or arrays, gives no truth value.
    return value is None or (not isinstance(value, str) and str(value) in ("nan", "NaT", "<NA>"))


def _key(value: Any) -> Hashable:
    """The value as text with its type: metadata may hold anything, lists too."""
    return f"{type(value).__name__} {value!r}"


def _document(row: int, names: Sequence[str], metadata: Mapping[str, Sequence[Any]]) -> Hashable:
    """What names the document of a paragraph: its column, or its name without the window's place.

    Two paragraphs may have the same name and be of different files, which numbered both of them:
    a name that occurs again (`#2`) is that of another document.
    """
    for column in DOCUMENT_COLUMNS:
        if column in metadata and not _missing(metadata[column][row]):
            return column, _key(metadata[column][row])
    return "name", window_place(names[row])[0]


def _join_near_copies(parents: _Parents, content: np.ndarray, rows: Sequence[int]) -> None:
    """Join paragraphs that share many runs of tokens; exact copies are compared once."""
    from datasketch import MinHash, MinHashLSH

    distinct = list({content[row].tobytes(): row for row in reversed(rows)}.values())
    if len(distinct) < 2:
        return
    length = min(SHINGLE, content.shape[1])
    shingles = {row: _shingles(content[row], length) for row in sorted(distinct)}
    sketches = MinHash.bulk(shingles.values(), num_perm=_BANDS * _ROWS, seed=1)
    state = random.getstate()  # the index draws a name for itself from the global generator
    index = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
    random.setstate(state)
    for row, sketch in zip(shingles, sketches, strict=True):
        indexed = False
        for candidate in index.query(sketch):
            similarity = _similarity(shingles[row], shingles[candidate])
            if similarity >= SIMILARITY:
                parents.join(row, candidate)
            indexed |= similarity >= _INTERCHANGEABLE
        # Thousands of nearly equal paragraphs would otherwise be compared pair by pair.
        if not indexed:
            index.insert(row, sketch)


def _shingles(ids: np.ndarray, length: int) -> set[bytes]:
    """The runs of `length` tokens of a paragraph."""
    return {run.tobytes() for run in np.lib.stride_tricks.sliding_window_view(ids, length)}


def _similarity(first: set[bytes], second: set[bytes]) -> float:
    """Jaccard similarity: runs in both, as a fraction of the runs in either."""
    n_shared = len(first & second)
    return n_shared / (len(first) + len(second) - n_shared)
