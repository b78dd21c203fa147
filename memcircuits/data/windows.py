"""Readers: from files to windows of token ids.

| ending | content |
| --- | --- |
| `.jsonl` | one object a line with token ids, `prefix_ids` and `suffix_ids`, or text |
| `.csv` | a column of text |
| `.txt` | paragraphs separated by blank lines |
| `.parquet` | columns as in `.jsonl` |
| `.npy` | an integer array [paragraph, pos]; `NAME_prefix.npy` with `NAME_suffix.npy` beside it |
| `.pt` | an integer tensor [paragraph, pos], read with `weights_only=True` |
| `hf:NAME[@REVISION][:SPLIT]` | a dataset on the hub, streamed, or a folder that `datasets` saved |

Token ids are a column `ids`, `tokens`, `input_ids` or `token_ids`, text is one `text` or
`paragraph`; `id` (or `index`) names the paragraphs, every other column becomes a fact of them. The
first three formats may be compressed (`.gz`, `.zst`); a folder means all its files.

The ids are the truth: text is encoded once, without special tokens, and `Windows` says which slices
of a row are taken. Where the file itself separates prefix from continuation, the slice is taken
around that place.

`read_paragraphs` is strict: the first row that cannot be used is an error. `cut`, on which scans of
whole corpora are built, collects such rows instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.data.formats.records import BadRow, Row
from memcircuits.data.tokens import decode, encode_all, encoded


@dataclass(frozen=True)
class Windows:
    """Which slices of a row are taken, and which of them are kept (the paper's section 3).

    Attributes:
        n_prefix: tokens of the prefix.
        n_continuation: tokens of the continuation.
        stride: tokens from one window to the next; None takes only the first window of a row.
        offset: where the first window begins.
        min_unique: a window is kept if its share of different tokens exceeds this (paper: 0.5).
        drop: a window is left out if its text contains one of these, whatever the case.
        deduplicate: exact duplicates are taken once and counted.
    """

    n_prefix: int = 50
    n_continuation: int = 50
    stride: int | None = None
    offset: int = 0
    min_unique: float = 0.0
    drop: tuple[str, ...] = ()
    deduplicate: bool = False

    def __post_init__(self) -> None:
        at_least("n_prefix", self.n_prefix, 1)
        at_least("n_continuation", self.n_continuation, 1)
        at_least("offset", self.offset, 0)
        if self.stride is not None:
            at_least("stride", self.stride, 1)
        if not 0 <= self.min_unique < 1:
            raise InputError("min_unique", self.min_unique, "give a number in [0, 1)")
        if not all(self.drop):
            raise InputError("drop", "an empty keyword", "it would drop every window")

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.n_prefix + self.n_continuation


@dataclass(frozen=True)
class Cut:
    """Windows of some rows, and what became of the rest.

    Attributes:
        ids: token ids, [window, pos].
        rows: for each window its index in `origin`.
        starts: for each window its first token's place in the row.
        counts: how often each window occurred among these rows; 1 unless deduplicated.
        origin: the rows that could be used.
        bad: the rows that could not.
        left_out: filter -> windows that it left out.
    """

    ids: Int[Tensor, "window pos"]
    rows: Int[np.ndarray, " window"]
    starts: Int[np.ndarray, " window"]
    counts: Int[np.ndarray, " window"]
    origin: list[Row]
    bad: list[BadRow]
    left_out: dict[str, int]

    @property
    def names(self) -> list[str]:
        """The name of each window: its row's, with `@start` where it is not the first."""
        return [
            self.origin[row].name + (f"@{start}" if start else "")
            for row, start in zip(self.rows.tolist(), self.starts.tolist(), strict=True)
        ]


def cut(
    rows: Iterable[Row | BadRow], model: Any, windows: Windows, *, d_vocab: int | None = None
) -> Cut:
    """Encode rows and cut them into windows.

    Args:
        rows: what `Chunk.rows` gives.
        model: model or tokenizer, needed where rows hold text.
        windows: which slices to take.
        d_vocab: size of the vocabulary; rows with ids outside it are bad.

    Raises:
        InputError: if a row holds text and there is no tokenizer.
    """
    good: list[Row] = []
    bad: list[BadRow] = []
    for row in rows:
        (bad if isinstance(row, BadRow) else good).append(row)  # type: ignore[arg-type]
    encoded_rows = encoded(good, model)
    used: list[Row] = []
    pieces: list[Tensor] = []
    index: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    for row, ids in zip(good, encoded_rows, strict=True):
        reason, first, piece = windows_of(row, ids, windows, d_vocab)
        if reason:
            bad.append(BadRow(row.where, reason))
            continue
        n = len(piece)
        index.append(np.full(n, len(used)))
        starts.append(first + np.arange(n) * (windows.stride or 1))
        pieces.append(piece)
        used.append(row)
    none = np.zeros(0, dtype=np.int64)
    found = Cut(
        torch.cat([torch.zeros(0, windows.length, dtype=torch.long), *pieces]),
        np.concatenate([none, *index]),
        np.concatenate([none, *starts]),
        np.ones(sum(len(piece) for piece in pieces), dtype=np.int64),
        used,
        bad,
        {},
    )
    return _filtered(found, model, windows)


def windows_of(
    row: Row, ids: list[int], windows: Windows, d_vocab: int | None
) -> tuple[str, int, Tensor]:
    """Why a row gives no windows, the first window's start, and the windows [window, pos]."""
    nothing = torch.zeros(0)
    first, length = windows.offset, windows.length
    if row.split is not None:
        first = row.split - windows.n_prefix
        if first < 0:
            remedy = f"its prefix has {row.split} tokens; use n_prefix={row.split}"
            return remedy, 0, nothing
        ids = ids[: first + length]
    if len(ids) < first + length:
        needed = f"{first + length} are needed; use smaller lengths or remove the row"
        return f"it has {len(ids)} tokens, {needed}", 0, nothing
    if d_vocab is not None and max(ids) >= d_vocab:
        outside = f"token id {max(ids)} lies outside the vocabulary of {d_vocab}"
        return f"{outside}: were the ids made by another tokenizer?", 0, nothing
    stop = first + length if windows.stride is None else len(ids)
    tokens = torch.tensor(ids[first:stop], dtype=torch.long)
    return "", first, tokens.unfold(0, length, windows.stride or 1)


def _filtered(cut: Cut, model: Any, windows: Windows) -> Cut:
    keep = np.ones(len(cut.ids), dtype=bool)
    counts = cut.counts
    left_out: Counter[str] = Counter()
    if windows.min_unique:
        few = (n_unique(cut.ids) <= windows.min_unique * windows.length).numpy()
        left_out["few different tokens"] = int((keep & few).sum())
        keep &= ~few
    if windows.drop:
        words = [word.casefold() for word in windows.drop]
        texts = decode(cut.ids.tolist(), model) if len(cut.ids) else []
        named = np.array([any(w in text.casefold() for w in words) for text in texts], dtype=bool)
        left_out["keyword"] = int((keep & named).sum())
        keep &= ~named
    if windows.deduplicate and keep.any():
        kept = np.flatnonzero(keep)
        _, first, times = np.unique(
            cut.ids.numpy()[kept], axis=0, return_index=True, return_counts=True
        )
        counts = np.ones(len(keep), dtype=np.int64)
        counts[kept[first]] = times
        left_out["duplicate"] = len(kept) - len(first)
        keep = np.zeros(len(keep), dtype=bool)
        keep[kept[first]] = True
    return Cut(
        cut.ids[torch.from_numpy(keep)],
        cut.rows[keep],
        cut.starts[keep],
        counts[keep],
        cut.origin,
        cut.bad,
        dict(left_out),
    )


def n_unique(ids: Int[Tensor, "paragraph pos"]) -> Int[Tensor, " paragraph"]:
    """How many different tokens each paragraph has."""
    ordered = ids.sort(-1).values
    return (ordered[:, 1:] != ordered[:, :-1]).sum(-1) + 1


def retokenization_drift(ids: Int[Tensor, "paragraph pos"], model: Any) -> int:
    """How many paragraphs get other ids when their text is encoded again.

    The reason why ids, not texts, are the truth.
    """
    if not len(ids):
        return 0
    texts = decode(ids.tolist(), model)
    return sum(a != b for a, b in zip(encode_all(texts, model), ids.tolist(), strict=True))
