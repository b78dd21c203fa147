"""Formats are told by what a file holds; its name decides only where the content leaves it open.

Binary formats have their first bytes. Of texts, JSON and tables are told by their first record or
line, if these name a column that can be used; any other text is plain text. A name such as `.jsonl`
or `.csv` is believed where the content cannot contradict it: an empty file, a damaged one.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from memcircuits.data.formats.columns import is_usable
from memcircuits.data.formats.delimited import delimiter_of
from memcircuits.data.formats.json_text import first_record, json_kind
from memcircuits.data.formats.opening import compression_of, head_of, magic_of
from memcircuits.data.formats.records import (
    EMPTY,
    SAVE_AS_UTF8,
    Columns,
    Unusable,
)

ENDINGS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "jsonl"),
    ".json": "json",
    **dict.fromkeys((".csv", ".tsv", ".tab", ".psv"), "csv"),
    **dict.fromkeys((".txt", ".text"), "txt"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    ".npy": "npy",
    ".npz": "npz",
    **dict.fromkeys((".pt", ".pth"), "pt"),
}
"""Ending of a name -> the format that it promises."""

_PACKED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
_TEXTS = ("jsonl", "json", "csv", "txt")

_BINARY = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"FEA1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"\x93NUMPY": "npy",
    b"\x80": "pt",  # a pickle: whether it is a tensor is told without running it
}
_REFUSED = {
    b"%PDF": "a PDF; extract its text",
    b"\x89HDF": "an HDF5 file; save its table as parquet",
    b"SQLite format 3": "a database; save its table as parquet or CSV",
    b"\xd0\xcf\x11\xe0": "a document of an office program; save it as CSV or plain text",
    b"GGUF": "a model; give the file of paragraphs",
    b"ORC": "an ORC file; save it as parquet",
    b"Obj\x01": "an Avro file; save it as parquet",
    b"7z\xbc\xaf\x27\x1c": "an archive; unpack it and give the folder",
    b"Rar!": "an archive; unpack it and give the folder",
}


def known_endings() -> str:
    """The endings of all formats, for messages."""
    return ", ".join(ENDINGS)


def kind_by_name(name: str) -> str | None:
    """The format that a file's name promises, in any case, compressed or not."""
    path = PurePosixPath(name.lower())
    if path.suffix in _PACKED:
        path = path.with_suffix("")
    return ENDINGS.get(path.suffix)


def kind_of(path: Path, columns: Columns, *, in_folder: bool = False) -> str:
    """The format of a file: a key of `sources.FORMATS`.

    Args:
        path: the file.
        columns: the columns that the caller named.
        in_folder: the file was not named by the caller: plain text needs an ending that says so.

    Raises:
        Unusable: if it is of no known format; the reason says what it is instead.
    """
    promised = kind_by_name(path.name)
    magic = magic_of(str(path))
    if not magic:
        if promised is None:
            raise Unusable(EMPTY)
        return promised
    return _binary_kind(path, magic, promised) or _text_kind(path, promised, columns, in_folder)


def _binary_kind(path: Path, magic: bytes, promised: str | None) -> str | None:
    """The format that the first bytes tell; None for text, and for what is damaged."""
    for sign, reason in _REFUSED.items():
        if magic.startswith(sign):
            raise Unusable(f"it is {reason}")
    if magic[257:262] == b"ustar":
        raise Unusable("it is an archive; unpack it and give the folder")
    if magic.startswith(b"PK"):
        return _kind_of_archive(path, promised)
    return next((kind for sign, kind in _BINARY.items() if magic.startswith(sign)), None)


def _kind_of_archive(path: Path, promised: str | None) -> str:
    """Tensors of torch, arrays of numpy; other zip archives are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        if promised in ("pt", "npz"):
            return promised
        raise Unusable("it cannot be read (a damaged zip archive)") from None
    if any(name.endswith("data.pkl") for name in names):
        return "pt"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.startswith(("xl/", "word/")) for name in names):
        raise Unusable("it is a document of an office program; save it as CSV or plain text")
    raise Unusable("it is a zip archive; unpack it and give the folder")


def _text_kind(path: Path, promised: str | None, columns: Columns, in_folder: bool) -> str:
    """The layout of a text, which may be compressed."""
    try:
        head, whole = head_of(str(path))
    except Unusable:
        if promised is None:
            raise
        return promised  # its reader says what is wrong with it
    if compression_of(magic_of(str(path))):
        inner = next((kind for sign, kind in _BINARY.items() if head.startswith(sign)), None)
        if inner in ("parquet", "arrow", "npy") or head[257:262] == b"ustar":
            raise Unusable("it is compressed as a whole; unpack it")
    layout = json_kind(head, whole, columns)
    if layout is not None and (promised in ("json", "jsonl") or _has_record(head, columns)):
        return layout
    if promised == "csv" or (
        promised != "pt" and delimiter_of(_text(head), columns, plain=True) is not None
    ):
        return "csv"
    if promised is not None:
        return promised
    if not _is_text(head):
        raise Unusable(f"its format is not known; known endings are {known_endings()}")
    if in_folder:
        raise Unusable("plain text whose ending is not .txt")
    return "txt"


def _has_record(head: bytes, columns: Columns) -> bool:
    """Whether the first record of a text can be used: its first line, or its first object."""
    record = first_record(head, columns)
    return record is not None and is_usable(record, columns)


def _text(head: bytes) -> str:
    return head.decode("utf-8", "replace").lstrip("\ufeff")


def _is_text(head: bytes) -> bool:
    """Whether these bytes are text: UTF-8 without control characters.

    Raises:
        Unusable: if they are text in another encoding.
    """
    try:
        text = head[:-4].decode() if len(head) > 8 else head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 8 and _looks_like_latin1(head):
            raise Unusable(f"not UTF-8 text; {SAVE_AS_UTF8}") from None
        return error.start >= len(head) - 8 and _is_text(head[: error.start])
    return not any(ord(sign) < 32 and sign not in "\t\n\r\f\v" for sign in text)


def _looks_like_latin1(head: bytes) -> bool:
    return not any(byte < 32 and byte not in b"\t\n\r\f\v" for byte in head)
