"""Sources of rows: which files there are, which format each has, and how they are read in chunks.

A *source* is one file (or a Hugging Face dataset); `find_sources` lists those of a folder in a
fixed order. Reading has two halves, so that work can be shared out:

1. `read_chunks` only finds where rows begin and end and groups them into *chunks*. Chunks depend on
   the source alone, never on the computer, so they are the units of work of long scans; a chunk
   that is already done costs no more than finding its end.
2. `Chunk.rows` decodes: every row becomes a `Row` (token ids or text, a name, further columns) or a
   `BadRow` that says what is wrong with it. A file whose remainder cannot be read ends in a
   `BadRow` too.

An empty file is one `BadRow`: in a corpus of many files it may be the trace of a copy that failed.

`FORMATS` is the table of formats. A new one is one line there, and a reader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memcircuits.core.errors import InputError
from memcircuits.data.formats import tables, text
from memcircuits.data.formats.records import (
    COMPRESSION,
    EMPTY,
    BadRow,
    Decoder,
    RawRow,
    Reader,
    Row,
    Source,
    Unusable,
    make_row,
    unchanged,
)


@dataclass(frozen=True)
class Format:
    """How the files of one format are recognised and read.

    Attributes:
        ending: ending of the files' names; empty if files are not recognised by their name.
        read: finds where the rows begin and end.
        decode: turns what `read` found into a record.
        unit: what rows are counted in, for messages.
        compressible: whether the file may be compressed as a whole.
    """

    ending: str
    read: Reader
    decode: Decoder = unchanged
    unit: Literal["line", "row"] = "row"
    compressible: bool = False


# A file has the first format whose ending its name has.
FORMATS: dict[str, Format] = {
    "jsonl": Format(".jsonl", text.read_jsonl, text.decode_json, "line", compressible=True),
    "csv": Format(".csv", text.read_csv, text.decode_csv, "line", compressible=True),
    "txt": Format(".txt", text.read_txt, text.decode_txt, "line", compressible=True),
    "parquet": Format(".parquet", tables.read_parquet),
    "pair": Format(tables.PREFIX_ENDING, tables.read_pair),
    "npy": Format(".npy", tables.read_npy),
    "pt": Format(".pt", tables.read_pt),
    "hf": Format("", tables.read_dataset),
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


def find_sources(path: str | os.PathLike[str]) -> list[Source]:
    """The files of a corpus, in a fixed order.

    Args:
        path: a file; a folder, whose files of known formats are taken in the order of their names;
            or `hf:NAME[@REVISION][:SPLIT[:CONFIG]]`, a dataset on the hub (streamed) or a saved
            one. A scan that may be resumed should pin the revision.

    Raises:
        InputError: if there is nothing to read, or a file's format is not known.
    """
    name = os.fspath(path)
    if name.startswith("hf:"):
        return [Source(name, name.removeprefix("hf:").lstrip("/"), "hf")]
    location = Path(path)
    try:
        is_file, is_folder = location.is_file(), location.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_file = is_folder = False
    if is_folder:
        return _sources_in(location)
    if not is_file:
        raise InputError("paragraphs", location.name, "there is no such file")
    kind = _kind(location)
    if kind is None:
        raise InputError("paragraphs", location.name, f"known endings are {_known_endings()}")
    return [Source(str(location), location.name, kind)]


def _sources_in(folder: Path) -> list[Source]:
    """The files of a folder: a saved dataset, the parts of a scan, or all of known formats."""
    if tables.is_saved_dataset(folder):
        return [Source(f"hf:{folder}", folder.name, "hf")]
    if (folder / "manifest.json").is_file() and (folder / "parts").is_dir():
        folder /= "parts"
    sources = []
    for path in sorted(folder.rglob("*")):
        kind = _kind(path)
        if kind and path.is_file() and not _hidden(path, folder) and not tables.is_suffix(path):
            sources.append(Source(str(path), path.relative_to(folder).as_posix(), kind))
    if not sources:
        raise InputError(
            "paragraphs", f"{folder.name} is a folder", f"it holds no {_known_endings()}"
        )
    return sources


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
        for number, content, n_bytes in source_format.read(source):
            yield number, content, n_bytes
    except Unusable as problem:
        after = f"{source.name}, after {source_format.unit} {number}"
        yield number + 1, BadRow(after if number else source.name, str(problem)), 0
        return
    if not number:
        yield 1, BadRow(source.name, EMPTY), 0


def content_files(source: Source) -> list[Path]:
    """The local files that hold a source's content; none for a dataset on the hub.

    Of a saved dataset those that describe it: `datasets` keeps a fingerprint of the content there.
    """
    if source.kind == "hf":
        folder = Path(source.path.removeprefix("hf:").split(":")[0])
        return sorted(folder.rglob("state.json")) if tables.is_saved_dataset(folder) else []
    path = Path(source.path)
    return [path, tables.suffix_of(path)] if source.kind == "pair" else [path]


def _kind(path: Path) -> str | None:
    """The format that a file's name tells, None if it is not known."""
    compressed = path.suffix in COMPRESSION
    name = path.name.removesuffix(path.suffix) if compressed else path.name
    if not Path(name).suffix:  # `.csv` is a hidden file, not a table
        return None
    for kind, known in FORMATS.items():
        if known.ending and name.endswith(known.ending):
            return kind if known.compressible or not compressed else None
    return None


def _known_endings() -> str:
    """The endings of all formats, for messages."""
    known = [f for f in FORMATS.values() if f.ending.startswith(".")]
    compressible = [f.ending for f in known if f.compressible]
    others = [f.ending for f in known if not f.compressible]
    compression = " or ".join(COMPRESSION)
    return f"{', '.join(compressible)} (each also {compression}), {', '.join(others)}"


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
