"""File formats: from bytes to rows, one after the other, in bounded memory.

A *source* is one file (or a Hugging Face dataset); `find_sources` lists those of a folder in a
fixed order. Reading has two halves, so that work can be shared out:

1. `read_chunks` only finds where rows begin and end and groups them into *chunks*. Chunks depend on
   the source alone, never on the machine, so they are the units of work of long scans; a chunk that
   is already done costs no more than finding its end.
2. `Chunk.rows` decodes: every row becomes a `Row` (token ids or text, a name, further columns) or a
   `BadRow` that says what is wrong with it. A file that cannot be read on ends in a `BadRow` too.

Lines and text blocks above `LIMIT` bytes are passed over without being held in memory. An empty
file is one `BadRow` too: in a corpus of many files it may be the trace of a copy that failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcircuits.core.errors import InputError
from memcircuits.data.formats.records import (
    COMPRESSION,
    EMPTY,
    BadRow,
    Decoder,
    Reader,
    Row,
    Source,
    Unusable,
    make_row,
    unchanged,
)
from memcircuits.data.formats.tables import (
    is_saved_dataset,
    is_second_half,
    read_dataset,
    read_npy,
    read_pair,
    read_parquet,
    read_pt,
    second_half,
)
from memcircuits.data.formats.text import (
    decode_csv,
    decode_json,
    decode_txt,
    read_csv,
    read_jsonl,
    read_txt,
)


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
        decode = FORMATS[self.source.kind][1]
        for number, raw in self.raw:
            if isinstance(raw, BadRow):
                yield raw
                continue
            where = f"{self.source.name}, {self.source.unit} {number}"
            try:
                yield make_row(self.source, number, where, decode(raw))
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
    found = Path(path)
    try:
        is_file, is_folder = found.is_file(), found.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_file = is_folder = False
    if is_folder:
        if is_saved_dataset(found):
            return [Source(f"hf:{found}", found.name, "hf")]
        if (found / "manifest.json").is_file() and (found / "parts").is_dir():
            found /= "parts"
        files = sorted(f for f in found.rglob("*") if f.is_file() and not _hidden(f, found))
        kinds = [(f, _kind(f)) for f in files if not is_second_half(f)]
        sources = [Source(str(f), f.relative_to(found).as_posix(), k) for f, k in kinds if k]
        if not sources:
            raise InputError("paragraphs", f"{found.name} is a folder", f"it holds no {_ENDINGS}")
        return sources
    if not is_file:
        raise InputError("paragraphs", found.name, "there is no such file")
    kind = _kind(found)
    if kind is None:
        raise InputError("paragraphs", found.name, f"known endings are {_ENDINGS}")
    return [Source(str(found), found.name, kind)]


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """All rows of a source; see `read_chunks`."""
    for chunk in read_chunks(source):
        yield from chunk.rows()


def read_chunks(source: Source, records: int = 1024) -> Iterator[Chunk]:
    """Group the rows of a source: at most `records` rows and as many KiB (or one longer row)."""
    raw: list[tuple[int, Any]] = []
    size = index = 0
    for number, content, n_bytes in _raw_or_bad(source):
        if raw and (len(raw) == records or size + n_bytes > records * 1024):
            yield Chunk(source, index, raw)
            raw, size, index = [], 0, index + 1
        raw.append((number, content))
        size += n_bytes
    if raw:
        yield Chunk(source, index, raw)


def _raw_or_bad(source: Source) -> Iterator[tuple[int, Any, int]]:
    number = 0
    try:
        for number, content, n_bytes in FORMATS[source.kind][0](source):
            yield number, content, n_bytes
    except Unusable as problem:
        where = f"{source.name}, after {source.unit} {number}" if number else source.name
        yield number + 1, BadRow(where, str(problem)), 0
        return
    if not number:
        yield 1, BadRow(source.name, EMPTY), 0


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSION:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in ("jsonl", "csv", "txt") else None
    if path.name.endswith("_prefix.npy"):
        return "pair"
    return _KINDS.get(path.suffix)


def content_files(source: Source) -> list[Path]:
    """The files on this machine that hold a source's content; none for a dataset on the hub.

    Of a saved dataset those that describe it: `datasets` keeps a fingerprint of the content there.
    """
    if source.kind == "hf":
        folder = Path(source.path.removeprefix("hf:").split(":")[0])
        return sorted(folder.rglob("state.json")) if is_saved_dataset(folder) else []
    path = Path(source.path)
    return [path, second_half(path)] if source.kind == "pair" else [path]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


FORMATS: dict[str, tuple[Reader, Decoder]] = {
    "jsonl": (read_jsonl, decode_json),
    "csv": (read_csv, decode_csv),
    "txt": (read_txt, decode_txt),
    "parquet": (read_parquet, unchanged),
    "npy": (read_npy, unchanged),
    "pair": (read_pair, unchanged),
    "pt": (read_pt, unchanged),
    "hf": (read_dataset, unchanged),
}


_KINDS = {f".{kind}": kind for kind in ("jsonl", "csv", "txt", "parquet", "npy", "pt")}


_ENDINGS = ".jsonl, .csv, .txt (each also .gz or .zst), .parquet, .npy, .pt"
