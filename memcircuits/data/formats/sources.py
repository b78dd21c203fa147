"""Sources of rows: every format's reader, and how files are read in chunks.

A *source* is one file (or a Hugging Face dataset); `listing` finds those of a folder. Reading has
two halves, so that work can be shared out:

1. `read_chunks` only finds where rows begin and end and groups them into *chunks*. Chunks depend on
   the source alone, never on the computer, so they are the units of work of long scans; a chunk
   that is already done costs no more than finding its end.
2. `Chunk.rows` decodes: every row becomes a `Row` (token ids or text, a name, further columns) or a
   `BadRow` that says what is wrong with it. A file that cannot be read to its end, or that changes
   while it is read, ends in a `BadRow` that is marked `unread`.

An empty file is one `BadRow`: in a corpus of many files it may be the trace of a copy that failed.

`FORMATS` is the table of formats. A new one is one line there, a reader, and how it is told from
the others in `detection`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memcircuits.data.formats import arrays, delimited, json_text, tables, text
from memcircuits.data.formats.columns import make_row
from memcircuits.data.formats.records import (
    EMPTY,
    BadRow,
    Decoder,
    RawRow,
    Reader,
    Row,
    Source,
    Unusable,
    unchanged,
)


@dataclass(frozen=True)
class Format:
    """How the files of one format are read.

    Attributes:
        read: finds where the rows begin and end.
        decode: turns what `read` found into a record.
        unit: what rows are counted in, for messages.
    """

    read: Reader
    decode: Decoder = unchanged
    unit: Literal["line", "row", "document"] = "row"


FORMATS: dict[str, Format] = {
    "jsonl": Format(json_text.read_jsonl, json_text.decode_json, "line"),
    "json": Format(json_text.read_json),
    "csv": Format(delimited.read_csv, delimited.decode_csv, "line"),
    "txt": Format(text.read_txt, text.decode_txt, "line"),
    "document": Format(text.read_document, text.decode_document, "document"),
    "parquet": Format(tables.read_parquet),
    "arrow": Format(tables.read_arrow),
    "pair": Format(arrays.read_pair),
    "npy": Format(arrays.read_npy),
    "npz": Format(arrays.read_npz),
    "pt": Format(arrays.read_pt),
    "hf": Format(tables.read_dataset),
}


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one source, not decoded yet.

    Attributes:
        source: the file.
        index: number of the chunk in its source.
        raw: (row number, undecoded row).
    """

    source: Source
    index: int
    raw: list[tuple[int, Any]]

    def rows(self) -> Iterator[Row | BadRow]:
        """Decode the rows."""
        source_format = FORMATS[self.source.kind]
        for number, content in self.raw:
            if isinstance(content, BadRow):
                yield content
                continue
            where = f"{self.source.name}, {source_format.unit} {number}"
            try:
                yield make_row(self.source, number, where, source_format.decode(content))
            except Unusable as problem:
                yield BadRow(where, str(problem))
            except RecursionError:
                yield BadRow(where, "its columns are nested too deeply")


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """All rows of a source; see `read_chunks`."""
    for chunk in read_chunks(source):
        yield from chunk.rows()


def read_chunks(source: Source, records: int = 1024) -> Iterator[Chunk]:
    """Group the rows of a source: at most `records` rows and as many KiB (or one longer row)."""
    raw: list[tuple[int, Any]] = []
    size = index = 0
    for number, content, n_bytes in _raw_rows(source):
        if raw and (len(raw) == records or size + n_bytes > records * 1024):
            yield Chunk(source, index, raw)
            raw, size, index = [], 0, index + 1
        raw.append((number, content))
        size += n_bytes
    if raw:
        yield Chunk(source, index, raw)


def _raw_rows(source: Source) -> Iterator[RawRow]:
    """What the reader finds; a `BadRow` at the end of a damaged file, or for an empty one."""
    source_format = FORMATS[source.kind]
    number = 0
    try:
        for number, content, n_bytes in _while_unchanged(source, source_format.read):
            yield number, content, n_bytes
    except Unusable as problem:
        if number:
            where = f"{source.name}, after {source_format.unit} {number}"
            problem = Unusable(f"{problem}; what follows was not read")
        else:
            where = source.name
        yield number + 1, BadRow(where, str(problem), unread=True), 0
        return
    if not number:
        yield 1, BadRow(source.name, EMPTY), 0


def _while_unchanged(source: Source, read: Reader) -> Iterator[RawRow]:
    """What a reader finds, unless its files change while they are read.

    Raises:
        Unusable: if they do, whatever the reader made of it.
    """
    before = _states(source)
    try:
        yield from read(source)
    except Unusable:
        _check_unchanged(source, before)
        raise
    _check_unchanged(source, before)


def _states(source: Source) -> list[tuple[int, ...] | None]:
    """What tells one version of a source's files from another."""
    states: list[tuple[int, ...] | None] = []
    for path in content_files(source):
        try:
            stat = os.stat(path)
        except OSError:
            states.append(None)
        else:
            states.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return states


def _check_unchanged(source: Source, before: list[tuple[int, ...] | None]) -> None:
    if _states(source) != before:
        raise Unusable("it changed while it was read; read it when no other process writes to it")


def content_files(source: Source) -> list[Path]:
    """The local files that hold a source's content; none for a dataset on the hub."""
    if source.kind == "hf":
        return []
    path = Path(source.path)
    other = arrays.other_half(path) if source.kind == "pair" else None
    return [path] if other is None else [path, other]
