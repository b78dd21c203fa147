"""Reading paragraphs: windows of every row, of files or of texts that are given.

`Paragraphs.read` and `from_texts` are built from this. A row that cannot be used is an error that
names it, or else is skipped and counted (`memcircuits.data.row_notes`). Where normalising changed a
text, the ids of the text as it is written are kept beside the others, so that a scan can measure
both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.formats.listing import list_files
from memcircuits.data.formats.records import EMPTY, BadRow, Columns, Row
from memcircuits.data.formats.sources import read_chunks, read_rows
from memcircuits.data.formats.text import Txt
from memcircuits.data.metadata import columns_of
from memcircuits.data.normalizing import (
    Normalize,
    check_normalize,
    in_words,
    is_rewritten,
    reading_notes,
)
from memcircuits.data.row_notes import row_counts, row_notes
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
            was changed, or rows have several windows.
        notes: what the reader must know about the files and texts.
        reading_options: `normalize`, `columns`, `stride`, `txt`, `strict` and `align`, where they
            are not the defaults.
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
    txt: Txt,
    strict: bool,
) -> Reading:
    """The windows of every row of a file, folder or dataset; arguments as `_read_rows`.

    Raises:
        InputError: for the first row that cannot be used if `strict`, or if there is no window.
    """
    check_normalize(normalize)
    listing = list_files(path, columns, txt=txt, strided=windows.stride is not None)
    rows = [row for source in listing.sources for row in read_rows(source)]
    if all(isinstance(row, BadRow) and row.reason == EMPTY for row in rows):
        empty = f"{listing.sources[0].name} is empty"
        raise InputError("paragraphs", empty, "give at least one paragraph")
    reading = _read_rows(
        rows, model, windows, normalize=normalize, bos=bos, notes=listing.notes, strict=strict
    )
    named = {part: name for part, name in vars(columns).items() if name is not None}
    chosen = {"columns": named, "stride": windows.stride, "txt": None if txt == "auto" else txt}
    return _with_options(reading, {key: value for key, value in chosen.items() if value})


def check_file(path: str | os.PathLike[str], columns: Columns, *, txt: Txt, strided: bool) -> None:
    """Refuse a file of which no tokenizer can read the first rows, such as for a wrong column.

    Nothing is encoded, so a mistake is told before a model is loaded.

    Raises:
        InputError: if there is nothing to read, or the first rows of a file all have one fault.
    """
    if os.fspath(path).startswith("hf:"):
        return
    listing = list_files(path, columns, txt=txt, strided=strided)
    chunk = next(read_chunks(listing.sources[0]), None) if len(listing.sources) == 1 else None
    rows = [] if chunk is None else list(chunk.rows())
    reasons = {row.reason if isinstance(row, BadRow) else "" for row in rows}
    if len(reasons) == 1 and not reasons & {"", EMPTY}:
        raise InputError("paragraphs", rows[0].where, reasons.pop())


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
    rows: Sequence[Row | BadRow],
    model: TokenizerLike | None,
    windows: Windows,
    *,
    normalize: Normalize,
    bos: tuple[int, ...],
    notes: tuple[str, ...] = (),
    argument: str = "paragraphs",
    strict: bool = True,
) -> Reading:
    """The windows of every row.

    Args:
        rows: the rows.
        model: model or tokenizer, needed where there is text.
        windows: which windows are cut.
        normalize: whether texts are normalised before they are encoded.
        bos: ids of the tokens in front, which are no part of a window.
        notes: what is known about the files.
        argument: name of the rows in errors.
        strict: whether a row that cannot be used is an error; an empty file is none.

    Raises:
        InputError: for the first row that cannot be used if `strict`, or if no row can.
    """
    cuts = cut(rows, model, windows, normalize=normalize, bos=bos, with_lines=True)
    problems = [row for row in cuts.bad if row.reason != EMPTY]
    if problems and (strict or not len(cuts.ids)):
        where = problems[0].where
        if not strict and len(problems) > 1:
            where = f"none of {len(rows):,} rows can be used; {where}"
        raise InputError(argument, where, problems[0].reason)
    unusable = next((f"{row.where}, {row.reason}" for row in cuts.bad if not row.short), "")
    counts = row_counts(len(rows), cuts)
    of_files = argument == "paragraphs"
    about_rows = row_notes(counts, windows.length, unusable, remedy=of_files)
    origin = [cuts.origin[i] for i in cuts.rows.tolist()]
    metadata = columns_of(row.metadata for row in origin)
    if cuts.lines is not None and "line" not in metadata:
        metadata["line"] = tuple(line or None for line in cuts.lines.tolist())
    if any(row.changes for row in origin):
        metadata["changed"] = tuple(in_words(row.changes) for row in origin)
    return Reading(
        cuts.ids,
        tuple(cuts.names),
        metadata,
        None if windows.stride else _as_written(rows, cuts, model, windows, bos),
        (*notes, *about_rows, *reading_notes([row.changes for row in cuts.origin])),
        {
            **({} if normalize == "auto" else {"normalize": normalize}),
            **({"strict": False} if problems else {}),
        },
    )


def _as_written(
    rows: Sequence[Row | BadRow],
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
    given = {row.where: row for row in rows}
    for i in rewritten:
        row = given[cuts.origin[i].where]
        as_it_is = cut([row], model, windows, normalize="none", bos=bos)
        if len(as_it_is.ids):
            written[i] = as_it_is.ids[0]
    return written
