"""Rows: what every file format is reduced to, and the reasons why a record is refused.

A reader finds the *records* of a file, as mappings of column names to values. `make_row` turns a
record into a `Row`: token ids, or else text; a name; and all other columns as metadata. A record
that cannot be used raises `Unusable`, and becomes a `BadRow` that keeps the reason, so that one bad
line costs neither a corpus scan nor the explanation.

Everything that a file may hold is expected: wrong types, ids that fit no tensor, bytes that are not
UTF-8, halves of surrogate pairs (which JSON can write and no file or screen can take).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeAlias

LIMIT = 16 * 2**20
"""Bytes of the longest line, block or text that is read."""

IDS = ("ids", "tokens", "input_ids", "token_ids")
TEXT = ("text", "paragraph")
SPLIT = ("prefix_ids", "suffix_ids")
NAMES = ("id", "index")

EMPTY = "it is empty"
TOO_LONG = f"longer than {LIMIT // 2**20} MiB; split it into shorter documents"

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Source:
    """One file or dataset.

    Attributes:
        path: where it is.
        name: what it is called in results: the path below the folder that was asked for.
        kind: key of the table `FORMATS`.
    """

    path: str
    name: str
    kind: str

    @property
    def stem(self) -> str:
        """The name without its endings."""
        path = PurePosixPath(self.name)
        path = path.with_suffix("") if path.suffix in COMPRESSION else path
        return str(path if self.kind == "hf" else path.with_suffix(""))


RawRow: TypeAlias = tuple[int, Any, int]
"""Number of a row in its file, its undecoded content or a `BadRow`, and its size in bytes."""

Reader: TypeAlias = Callable[[Source], Iterable[RawRow]]
"""Finds where the rows of a source begin and end."""

Record: TypeAlias = dict[str, Any]
"""Column -> value."""

Decoder: TypeAlias = Callable[[Any], Record]
"""Turns the content that a reader found into a record."""


@dataclass(frozen=True)
class BadRow:
    """A row, or the remainder of a file, that cannot be used.

    Attributes:
        where: file and row, for messages.
        reason: what is wrong with it.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One usable row: `ids`, or else `text` still to be encoded.

    Attributes:
        where: file and row, for messages.
        number: line or row number in the file.
        name: its `id` column, or file and row number.
        text: the text, None where ids are given.
        ids: token ids, None where text is given.
        split: tokens of the prefix, where the file itself separates it from the continuation.
        metadata: all other columns; never the text, which can be decoded.
    """

    where: str
    number: int
    name: str
    text: str | None = None
    ids: list[int] | None = None
    split: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Unusable(Exception):
    """Why a record, or the remainder of a file, cannot be used."""


@contextlib.contextmanager
def errors_as_unusable(problem: str = "it cannot be read") -> Iterator[None]:
    """Turn whatever a library raises while it parses a file into `Unusable`."""
    try:
        yield
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unusable(f"{problem} ({reason[:200]})") from None


def make_row(source: Source, number: int, where: str, record: Record) -> Row:
    """The row of a record: its ids or text, its name and its metadata.

    Args:
        source: the file, which names rows that bear no name.
        number: line or row number in the file.
        where: file and row, for messages.
        record: the columns.

    Raises:
        Unusable: if there are neither ids nor text, or they are not what their column promises.
    """
    check_columns(record)
    used: tuple[str, ...]
    text, ids, split = None, None, None
    if all(key in record for key in SPLIT):
        used = SPLIT
        prefix, suffix = (_ids(record, half) for half in SPLIT)
        ids, split = prefix + suffix, len(prefix)
    else:
        key = next(key for key in (*IDS, *TEXT) if key in record)
        used = (key,)
        if key in IDS:
            ids = _ids(record, key)
        else:
            text = _text(record, key)
    name = next((record[key] for key in NAMES if record.get(key) is not None), None)
    return Row(
        where,
        number,
        f"{source.stem}-{number:05d}" if name is None else printable(name),
        text,
        ids,
        split,
        {
            printable(key): all_printable(value)
            for key, value in record.items()
            if key not in ("id", "text", *used)
        },
    )


def check_columns(columns: Collection[str]) -> None:
    """Raise `Unusable` if none of the columns holds token ids or text."""
    if all(key in columns for key in SPLIT) or any(key in columns for key in (*IDS, *TEXT)):
        return
    names = ", ".join(printable(name) for name in list(columns)[:10]) or "none"
    raise Unusable(
        f"its columns are {names}; it needs one of {', '.join(IDS + TEXT)}, "
        "or prefix_ids and suffix_ids"
    )


def _ids(record: Record, key: str) -> list[int]:
    ids = record[key]
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise Unusable(f"{key} must be a list of token ids")
    return ids


def _text(record: Record, key: str) -> str:
    text = record[key]
    if isinstance(text, bytes):
        text = decode_utf8(text)
    if not isinstance(text, str):
        raise Unusable(f"{key} must be a string")
    if len(text) > LIMIT:
        raise Unusable(TOO_LONG)
    if printable(text) != text:
        raise Unusable(f"{key} is not UTF-8 text")
    return text


def decode_utf8(raw: bytes) -> str:
    """Text of UTF-8 bytes, with or without a byte order mark.

    Raises:
        Unusable: if they are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 text ({error.reason})") from None


def printable(value: Any) -> str:
    """`str(value)` with halves of surrogate pairs escaped, which no file or screen can take."""
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "backslashreplace").decode() if not text.isascii() else text


def all_printable(value: Any) -> Any:
    """The value with every string in it, at any depth, `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [all_printable(v) for v in value]
    if isinstance(value, dict):
        return {printable(k): all_printable(v) for k, v in value.items()}
    return value


def size_in_bytes(record: Record) -> int:
    """Size of the strings and lists of a record, for chunks of similar size."""
    return sum(
        len(value) if isinstance(value, (str, bytes)) else 8 * len(value)
        for value in record.values()
        if isinstance(value, (str, bytes, list))
    )


def unchanged(record: Record) -> Record:
    """The decoder of formats whose reader already gives records."""
    return record
