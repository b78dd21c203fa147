"""TODO."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LIMIT = 16 * 2**20


EMPTY = "it is empty"


IDS = ("ids", "tokens", "input_ids", "token_ids")


TEXT = ("text", "paragraph")


SPLIT = ("prefix_ids", "suffix_ids")


NAMES = ("id", "index")


COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


TOO_LONG = f"longer than {LIMIT // 2**20} MiB; split it into shorter documents"


@dataclass(frozen=True)
class Source:
    """One file or dataset.

    Attributes:
        path: where it is.
        name: what it is called in results: the path below the folder that was asked for.
        kind: key of the table of formats.
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

    @property
    def unit(self) -> str:
        """What its rows are counted in."""
        return "line" if self.kind in ("jsonl", "csv", "txt") else "row"


@dataclass(frozen=True)
class BadRow:
    """A row, or the rest of a file, that cannot be used, and why."""

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
    """Why a row, or what is left of a file, cannot be used."""


def make_row(source: Source, number: int, where: str, record: dict[str, Any]) -> Row:
    used: tuple[str, ...]
    text, ids, split = None, None, None
    check_columns(record)
    if all(key in record for key in SPLIT):
        used = SPLIT
        prefix, suffix = (_ids(record, half) for half in used)
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
        {printable(k): clean(v) for k, v in record.items() if k not in ("id", "text", *used)},
    )


def check_columns(columns: Collection[str]) -> None:
    if all(key in columns for key in SPLIT) or any(key in columns for key in (*IDS, *TEXT)):
        return
    shown = ", ".join(printable(name) for name in list(columns)[:10]) or "none"
    raise Unusable(
        f"its columns are {shown}; it needs one of {', '.join(IDS + TEXT)}, "
        "or prefix_ids and suffix_ids"
    )


def _ids(record: dict[str, Any], key: str) -> list[int]:
    ids = record[key]
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise Unusable(f"{key} must be a list of token ids")
    return ids


def _text(record: dict[str, Any], key: str) -> str:
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


def printable(value: Any) -> str:
    """`str(value)` without halves of surrogate pairs, which no file or screen can take."""
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "backslashreplace").decode() if not text.isascii() else text


def clean(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, dict):
        return {printable(k): clean(v) for k, v in value.items()}
    return value


def decode_utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 text ({error.reason})") from None


def size_in_bytes(record: dict[str, Any]) -> int:
    return sum(
        len(value) if isinstance(value, (str, bytes)) else 8 * len(value)
        for value in record.values()
        if isinstance(value, (str, bytes, list))
    )


@contextlib.contextmanager
def damage(what: str = "it cannot be read") -> Iterator[None]:
    """Whatever a library raises while it parses a file is a problem of the file."""
    try:
        yield
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unusable(f"{what} ({reason[:200]})") from None


Reader = Callable[[Source], Iterable[tuple[int, Any, int]]]


Decoder = Callable[[Any], dict[str, Any]]


def unchanged(record: dict[str, Any]) -> dict[str, Any]:
    return record
