"""Windows: which slices of a row become paragraphs.

A row of a corpus is a document of any length. `Windows` says where its windows begin, how long they
are, and which of them are left out: those with few different tokens (the paper keeps paragraphs
with more than half of their tokens unique, section 3), those with a keyword, exact duplicates.
Where the file itself separates prefix from continuation, the window is taken around that place. Two
texts of which one is too short for this are cut from the beginning of both together, which is said.

Measurements are of the ids: text is encoded once, without special tokens, and sliced.
`retokenization_drift` shows why: encoding decoded text again often gives other ids.

`cut` collects rows that cannot be used, so that the scan of a corpus goes on; `Paragraphs.read` is
strict and refuses the file instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.data.bos import without_bos
from memcircuits.data.formats.records import BadRow, Row, TooShort, Unusable
from memcircuits.data.normalizing import MOVED, Normalize, is_rewritten, normalized_row
from memcircuits.data.tokens import TokenizerLike, decode, encode_all, ids_of_rows, split_rows


@dataclass(frozen=True)
class Windows:
    """Which slices of a row are taken, and which of them are kept (section 3).

    Attributes:
        n_prefix: tokens of the prefix.
        n_continuation: tokens of the continuation.
        stride: tokens from one window to the next; None takes only the first window of a row.
        offset: where the first window begins.
        min_unique: a window is kept if its share of different tokens exceeds this (paper: 0.5).
        drop: a window is left out if its text contains one of these keywords, in any case.
        deduplicate: keep exact duplicates once, and count them.
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
        """Number of tokens of a window."""
        return self.n_prefix + self.n_continuation


@dataclass(frozen=True)
class Cut:
    """Windows of some rows, and which rows and windows were left out.

    Attributes:
        ids: token ids, [window, pos].
        rows: for each window its index in `origin`.
        starts: for each window its first token's place in the row.
        counts: how often each window occurred among these rows; 1 unless deduplicated.
        origin: the rows that could be used, with what was changed in them.
        bad: the rows that could not.
        left_out: filter -> number of windows that it left out.
        n_longer: number of rows with further tokens behind their only window.
        lines: for each window the line of its row's text in which its continuation begins, from 1;
            0 where that is not known. None if not asked for, or if no text has a second line.
    """

    ids: Int[Tensor, "window pos"]
    rows: Int[np.ndarray, " window"]
    starts: Int[np.ndarray, " window"]
    counts: Int[np.ndarray, " window"]
    origin: list[Row]
    bad: list[BadRow]
    left_out: dict[str, int]
    n_longer: int = 0
    lines: Int[np.ndarray, " window"] | None = None

    @property
    def names(self) -> list[str]:
        """The name of each window: its row's, with `@start` where it is not the first."""
        return [
            self.origin[row].name + (f"@{start}" if start else "")
            for row, start in zip(self.rows.tolist(), self.starts.tolist(), strict=True)
        ]


def cut(
    rows: Iterable[Row | BadRow],
    model: TokenizerLike | None,
    windows: Windows,
    *,
    d_vocab: int | None = None,
    bos: tuple[int, ...] = (),
    normalize: Normalize = "none",
    with_lines: bool = False,
) -> Cut:
    """Encode rows and cut them into windows.

    Args:
        rows: what `Chunk.rows` gives.
        model: model or tokenizer, needed where rows hold text.
        windows: which slices to take.
        d_vocab: size of the vocabulary; rows with ids outside it are bad.
        bos: ids of the tokens in front of every window. They are no part of windows; rows that
            begin with them begin behind them.
        normalize: whether texts are normalised before they are encoded.
        with_lines: say in which lines continuations begin, where all windows of a row are taken.

    Raises:
        InputError: if a row holds text and there is no tokenizer.
    """
    good: list[Row] = []
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            good.append(normalized_row(row, normalize))
    ids_of_good = ids_of_rows(good, model)
    split = split_rows(good, ids_of_good, model)
    good = [_with_room(row, len(ids), windows) for row, ids in zip(split, ids_of_good, strict=True)]

    n_longer = 0
    used: list[Row] = []
    ids_of_used: list[Tensor] = []
    row_of_window: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    starts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    lines: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    has_lines = with_lines and windows.stride is not None
    has_lines = has_lines and any("\n" in (row.text or "") for row in good)
    for row, ids in zip(good, ids_of_good, strict=True):
        try:
            first, row_windows = _windows_of_row(row, ids, windows, d_vocab, bos)
        except Unusable as problem:
            bad.append(BadRow(row.where, str(problem), short=isinstance(problem, TooShort)))
            continue
        n_behind = len(without_bos(ids, bos)) - first - windows.length
        is_one_text = row.split is None and row.prefix is None
        n_longer += windows.stride is None and is_one_text and n_behind > 0
        n = len(row_windows)
        row_of_window.append(np.full(n, len(used)))
        starts.append(first + np.arange(n) * (windows.stride or 1))
        if has_lines:
            lines.append(_lines_at(row, ids, starts[-1] + windows.n_prefix, model))
        ids_of_used.append(row_windows)
        used.append(row)

    no_windows = torch.zeros(0, windows.length, dtype=torch.long)
    every_window = Cut(
        ids=torch.cat([no_windows, *ids_of_used]),
        rows=np.concatenate(row_of_window),
        starts=np.concatenate(starts),
        counts=np.ones(sum(map(len, ids_of_used)), dtype=np.int64),
        origin=used,
        bad=bad,
        left_out={},
        n_longer=n_longer,
        lines=np.concatenate(lines) if has_lines else None,
    )
    return _filtered(every_window, model, windows)


def _with_room(row: Row, n_tokens: int, windows: Windows) -> Row:
    """The row; without the border between its two texts if that leaves no room for a window."""
    if row.prefix is None or row.split is None or n_tokens < windows.length:
        return row
    if windows.n_prefix <= row.split <= n_tokens - windows.n_continuation:
        return row
    return dataclasses.replace(row, split=None, changes={**row.changes, MOVED: 1})


def _windows_of_row(
    row: Row, ids: list[int], windows: Windows, d_vocab: int | None, bos: tuple[int, ...]
) -> tuple[int, Int[Tensor, "window pos"]]:
    """The first window's start, and the windows.

    Raises:
        TooShort: if the row has fewer tokens than a window.
        Unusable: if it has ids outside the vocabulary.
    """
    first, length = windows.offset, windows.length
    n_all, ids = len(ids), without_bos(ids, bos)
    if row.split is not None:
        # One window, around the place where the file separates prefix and continuation.
        split = row.split - (n_all - len(ids))
        first, n_behind = split - windows.n_prefix, len(ids) - split
        if first < 0:
            raise TooShort(f"its prefix has {split} tokens; use n_prefix={split}")
        if n_behind < windows.n_continuation:
            raise TooShort(f"its continuation has {n_behind} tokens; use n_continuation={n_behind}")
        ids = ids[: first + length]
    if len(ids) < first + length:
        needed = f"{first + length} are needed; use a smaller n_prefix or n_continuation"
        raise TooShort(f"it has {len(ids)} tokens, {needed}, or remove the row")
    if d_vocab is not None and max(ids) >= d_vocab:
        outside = f"token id {max(ids)} lies outside the vocabulary of {d_vocab}"
        raise Unusable(f"{outside}: were the ids made by another tokenizer?")
    stop = first + length if windows.stride is None else len(ids)
    tokens = torch.tensor(ids[first:stop], dtype=torch.long)
    return first, tokens.unfold(0, length, windows.stride or 1)


def _lines_at(
    row: Row, ids: list[int], places: Int[np.ndarray, " window"], model: TokenizerLike | None
) -> Int[np.ndarray, " window"]:
    """The lines in which these tokens are, 0 if the row's text was changed or is not known.

    A line break is one byte, and so within one token.
    """
    if row.text is None or is_rewritten(row):
        return np.zeros(len(places), dtype=np.int64)
    different = sorted(set(ids))
    texts = decode([[token] for token in different], model)
    breaks = {token: text.count("\n") for token, text in zip(different, texts, strict=True)}
    before = np.cumsum([0, *(breaks[token] for token in ids)])
    return 1 + before[places]


def _filtered(every: Cut, model: TokenizerLike | None, windows: Windows) -> Cut:
    """The windows that pass the filters; each counts what it left out of what was still kept."""
    keep = np.ones(len(every.ids), dtype=bool)
    counts = every.counts
    left_out: dict[str, int] = {}
    if windows.min_unique:
        few = (n_unique(every.ids) <= windows.min_unique * windows.length).numpy()
        left_out["few different tokens"] = int((keep & few).sum())
        keep &= ~few
    if windows.drop:
        named = _has_keyword(every.ids, model, windows.drop)
        left_out["keyword"] = int((keep & named).sum())
        keep &= ~named
    if windows.deduplicate and keep.any():
        kept = np.flatnonzero(keep)
        first, counts = _first_of_duplicates(every.ids.numpy(), kept)
        left_out["duplicate"] = int(keep.sum() - first.sum())
        keep = first
    return Cut(
        every.ids[torch.from_numpy(keep)],
        every.rows[keep],
        every.starts[keep],
        counts[keep],
        every.origin,
        every.bad,
        left_out,
        every.n_longer,
        None if every.lines is None else every.lines[keep],
    )


def _has_keyword(
    ids: Int[Tensor, "window pos"], model: TokenizerLike | None, keywords: tuple[str, ...]
) -> np.ndarray:
    """Whether the text of each window contains one of the keywords, in any case."""
    if not len(ids):
        return np.zeros(0, dtype=bool)
    words = [word.casefold() for word in keywords]
    texts = [text.casefold() for text in decode(ids.tolist(), model)]
    return np.array([any(word in text for word in words) for text in texts], dtype=bool)


def _first_of_duplicates(ids: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which windows are the first of their kind among the kept ones, and how often each occurs."""
    _, first, times = np.unique(ids[kept], axis=0, return_index=True, return_counts=True)
    is_first = np.zeros(len(ids), dtype=bool)
    is_first[kept[first]] = True
    counts = np.ones(len(ids), dtype=np.int64)
    counts[kept[first]] = times
    return is_first, counts


def n_unique(ids: Int[Tensor, "paragraph pos"]) -> Int[Tensor, " paragraph"]:
    """Number of different tokens in each paragraph."""
    ordered = ids.sort(-1).values
    return (ordered[:, 1:] != ordered[:, :-1]).sum(-1) + 1


def retokenization_drift(ids: Int[Tensor, "paragraph pos"], model: TokenizerLike) -> int:
    """Number of paragraphs that get other ids when their text is encoded again."""
    if not len(ids):
        return 0
    texts = decode(ids.tolist(), model)
    return sum(a != b for a, b in zip(encode_all(texts, model), ids.tolist(), strict=True))
