"""Rows: what every file format is reduced to, and the reasons why a record is refused.

A reader finds the *records* of a file, as mappings of column names to values. `columns.make_row`
turns a record into a `Row`: token ids, or else text; a name; and all other columns as metadata. A
record that cannot be used raises `Unusable`, and becomes a `BadRow` that keeps the reason, so that
one bad line costs neither a corpus scan nor the explanation.

Everything that a file may hold is expected: wrong types, ids that fit no tensor, bytes that are not
UTF-8, halves of surrogate pairs (which JSON can write and no file or screen can take).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from memcircuits.base.errors import InputError

LIMIT = 16 * 2**20
"""Bytes of the longest line, block or text that is read."""

EMPTY = "it is empty"
SAVE_AS_UTF8 = "save it as UTF-8 (from Latin-1, for instance: iconv -f latin1 -t utf8)"
TOO_LONG = f"longer than {LIMIT // 2**20} MiB; split it into shorter documents"


_ENDINGS = re.compile(r"\.[a-z]\w{0,8}(\.(gz|gzip|zst|bz2|xz|lz4))?$", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """The columns that hold the text, where their names do not tell.

    Attributes:
        text: column of the whole text (or of token ids).
        prefix: column of the prefix.
        continuation: column of the continuation.
    """

    text: str | None = None
    prefix: str | None = None
    continuation: str | None = None

    def __post_init__(self) -> None:
        if (self.prefix is None) != (self.continuation is None):
            raise InputError(
                "columns",
                "only one of prefix and continuation",
                "name both (--prefix-column and --continuation-column)",
            )
        if self.text is not None and self.prefix is not None:
            raise InputError(
                "columns", "text, and prefix with continuation", "name the text or its two parts"
            )

    @classmethod
    def of(cls, value: ColumnsLike) -> Columns:
        """What public functions take: None, `Columns`, or a mapping such as `{"text": "body"}`.

        Raises:
            InputError: if it is something else, or names an unknown part.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        parts = ("text", "prefix", "continuation")
        if not isinstance(value, Mapping) or not set(value) <= set(parts):
            raise InputError("columns", repr(value), f"give a mapping of {', '.join(parts)}")
        return cls(**value)


ColumnsLike: TypeAlias = Columns | Mapping[str, str] | None
"""`Columns`, a mapping such as `{"text": "body"}`, or None: the columns have usual names."""


@dataclass(frozen=True)
class Source:
    """One file or dataset.

    Attributes:
        path: where it is.
        name: what it is called in results: the path below the folder that was asked for.
        kind: key of the table `FORMATS`.
        columns: the columns that hold the text, where the caller named them.
    """

    path: str
    name: str
    kind: str
    columns: Columns = Columns()

    @property
    def stem(self) -> str:
        """The name without its endings."""
        return self.name if self.kind == "hf" else _ENDINGS.sub("", self.name)


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
        unread: whether this is the remainder of a file, of which nobody knows how many rows it has.
        short: whether all that is wrong is that it has fewer tokens than a window.
    """

    where: str
    reason: str
    unread: bool = False
    short: bool = False


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
        prefix: text of the prefix, where the file separates two texts; `text` begins with it.
        metadata: all other columns; never the text, which can be decoded.
        changes: what was taken away when it was read -> how often (padding).
        apart: whether the two texts are encoded one by one, and not as the one text they are.
    """

    where: str
    number: int
    name: str
    text: str | None = None
    ids: list[int] | None = None
    split: int | None = None
    prefix: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    apart: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """What is encoded: the text, or its two parts; nothing where ids are given."""
        if self.text is None:
            return ()
        if self.apart and self.prefix is not None:
            return self.prefix, self.text[len(self.prefix) :]
        return (self.text,)


class Unusable(Exception):
    """Why a record, or the remainder of a file, cannot be used."""


class TooShort(Unusable):
    """A row has fewer tokens than a window."""


class NoContent(Unusable):
    """No column of a file or record can hold token ids or text."""


@contextlib.contextmanager
def errors_as_unusable(problem: str = "it cannot be read") -> Iterator[None]:
    """Turn whatever a library raises while it parses a file into `Unusable`."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:
        if type(error) is MemoryError:  # that of Arrow is a damaged size, mostly
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unusable(f"{problem} ({reason[:200]})") from None


def decode_utf8(raw: bytes) -> str:
    """Text of UTF-8 bytes, with or without a byte order mark.

    Raises:
        Unusable: if they are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 text ({error.reason}); {SAVE_AS_UTF8}") from None


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
