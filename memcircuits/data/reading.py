"""Reading paragraphs strictly: one window of every row, or an error that names the row.

`Paragraphs.read` and `from_texts` are built from this; scans of corpora take `windows.cut`, which
collects bad rows instead. Where normalising changed a text, the ids of the text as it is written
are kept beside the others, so that a scan can measure both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.formats.listing import list_files
from memcircuits.data.formats.records import EMPTY, Columns, Row, Source
from memcircuits.data.formats.sources import read_rows
from memcircuits.data.metadata import columns_of
from memcircuits.data.normalizing import (
    Normalize,
    check_normalize,
    in_words,
    is_rewritten,
    reading_notes,
)
from memcircuits.data.tokens import TokenizerLike
from memcircuits.data.windows import Cut, Windows, cut


@dataclass(frozen=True)
class Reading:
    """What was read: the fields of `Paragraphs`.

    Attributes:
        ids: token ids, [paragraph, pos].
        names: a name for each.
        metadata: further columns, one value per paragraph; `changed` says what was changed.
        as_written: token ids of the texts as they are written, [paragraph, pos]; None if no text
            was changed.
        notes: what the reader must know about the files and texts.
        reading_options: `normalize`, `columns` and `align`, where they are not the defaults.
    """

    ids: Int[Tensor, "paragraph pos"]
    names: tuple[str, ...]
    metadata: Mapping[str, tuple[Any, ...]]
    as_written: Int[Tensor, "paragraph pos"] | None
    notes: tuple[str, ...]
    reading_options: Mapping[str, Any]


def read_file(
    path: str | os.PathLike[str],
    model: TokenizerLike | None,
    windows: Windows,
    *,
    columns: Columns,
    normalize: Normalize,
    bos: tuple[int, ...],
) -> Reading:
    """The first window of every row of a file, folder or dataset; arguments as `_read_rows`.

    Raises:
        InputError: for the first row that cannot be used, or if there is none.
    """
    check_normalize(normalize)
    listing = list_files(path, columns)
    rows = [row for source in listing.sources for row in _usable_rows(source)]
    if not rows:
        empty = f"{listing.sources[0].name} is empty"
        raise InputError("paragraphs", empty, "give at least one paragraph")
    reading = _read_rows(rows, model, windows, normalize=normalize, bos=bos, notes=listing.notes)
    named = {part: name for part, name in vars(columns).items() if name is not None}
    return _with_options(reading, {"columns": named} if named else {})


def read_texts(
    texts: Sequence[str | tuple[str, str]],
    model: TokenizerLike,
    windows: Windows,
    *,
    names: Sequence[str],
    align: bool,
    normalize: Normalize,
    bos: tuple[int, ...],
) -> Reading:
    """One window of every text, its first or that around the border of a pair.

    Arguments as `_read_rows`, and a name for each text. Unless `align`, the two texts of a pair are
    encoded apart.

    Raises:
        InputError: if there is no text, or one is too short.
    """
    check_normalize(normalize)
    texts = list(texts)
    if not texts:
        raise InputError("texts", "empty", "give at least one paragraph")
    names = tuple(names) or tuple(f"paragraph-{i:04d}" for i in range(len(texts)))
    if len(names) != len(texts):
        raise InputError("names", f"{len(names)} values", f"give {len(texts)}")
    rows = [
        _row_of_text(i, text, name, align)
        for i, (text, name) in enumerate(zip(texts, names, strict=True))
    ]
    reading = _read_rows(rows, model, windows, normalize=normalize, bos=bos, argument="texts")
    return _with_options(reading, {} if align else {"align": False})


def _with_options(reading: Reading, options: Mapping[str, Any]) -> Reading:
    return replace(reading, reading_options={**reading.reading_options, **options})


def _row_of_text(number: int, text: str | tuple[str, str], name: str, align: bool) -> Row:
    where = f"text {number}"
    if isinstance(text, str):
        return Row(where, number, name, text)
    is_pair = isinstance(text, (tuple, list)) and len(text) == 2
    if not is_pair or not all(isinstance(part, str) for part in text):
        what = f"{where} is {type(text).__name__}"
        raise InputError("texts", what, "give strings, or pairs of prefix and continuation")
    prefix, continuation = text
    return Row(where, number, name, prefix + continuation, prefix=prefix, apart=not align)


def _read_rows(
    rows: Sequence[Row],
    model: TokenizerLike | None,
    windows: Windows,
    *,
    normalize: Normalize,
    bos: tuple[int, ...],
    notes: tuple[str, ...] = (),
    argument: str = "paragraphs",
) -> Reading:
    """The first window of every row.

    Args:
        rows: the rows.
        model: model or tokenizer, needed where there is text.
        windows: how long a window is.
        normalize: whether texts are normalised before they are encoded.
        bos: ids of the tokens in front, which are no part of a window.
        notes: what is known about the files.
        argument: name of the rows in errors.

    Raises:
        InputError: for the first row that is too short, or has a prefix that is.
    """
    cuts = cut(rows, model, windows, normalize=normalize, bos=bos)
    if cuts.bad:
        raise InputError(argument, cuts.bad[0].where, cuts.bad[0].reason)
    metadata = columns_of(row.metadata for row in rows)
    changes = [row.changes for row in cuts.origin]
    if any(changes):
        metadata["changed"] = tuple(map(in_words, changes))
    return Reading(
        cuts.ids,
        tuple(row.name for row in rows),
        metadata,
        _as_written(rows, cuts, model, windows, bos),
        (*notes, *reading_notes(changes)),
        {} if normalize == "auto" else {"normalize": normalize},
    )


def _as_written(
    rows: Sequence[Row],
    cuts: Cut,
    model: TokenizerLike | None,
    windows: Windows,
    bos: tuple[int, ...],
) -> Int[Tensor, "paragraph pos"] | None:
    """Ids of the texts as they are written; where these are too short, those of the others."""
    rewritten = [i for i, row in enumerate(cuts.origin) if is_rewritten(row)]
    if not rewritten:
        return None
    written = cuts.ids.clone()
    for i in rewritten:
        as_it_is = cut([rows[i]], model, windows, normalize="none", bos=bos)
        if len(as_it_is.ids):
            written[i] = as_it_is.ids[0]
    return written


def _usable_rows(source: Source) -> Iterator[Row]:
    """The rows of a file; the first that cannot be used is an error, an empty file is not."""
    for row in read_rows(source):
        if isinstance(row, Row):
            yield row
        elif row.reason != EMPTY:
            raise InputError("paragraphs", row.where, row.reason)
