"""JSON in all its layouts: one record a line, arrays, pretty-printed or concatenated objects.

`json_kind` tells two layouts apart. Where every line is a record (`jsonl`), lines are found without
being parsed, and a damaged line costs only itself. Every other layout (`json`) is parsed from the
beginning, one value after the other, in bounded memory:

- an array, or values one after the other: each is a record;
- an object that holds a list of records under one of its keys (`{"data": [...]}`): each of them;
- an object whose columns are lists or numbered objects (as pandas writes them): each row.

A record may be an object, a text, or a list of token ids.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, Literal

from memcircuits.data.formats.columns import CHATS, TEXT, is_usable
from memcircuits.data.formats.opening import HEAD, lines_of, open_text
from memcircuits.data.formats.records import (
    LIMIT,
    SAVE_AS_UTF8,
    TOO_LONG,
    BadRow,
    Columns,
    RawRow,
    Record,
    Source,
    Unusable,
    decode_utf8,
    size_in_bytes,
)

_DECODER = json.JSONDecoder(parse_constant=lambda _: None)
_SPACE = " \t\r\n\ufeff"
_LONG_VALUE = re.compile(r'(\[\s*)?(\{\s*)?"|\[\s*\[\s*\d')

CONTAINERS = ("data", "rows", "records", "examples", "documents", "paragraphs", "instances")
"""Keys under which an object keeps its records; of other keys only if it holds nothing else."""


def read_jsonl(source: Source) -> Iterator[RawRow]:
    """Lines that are not blank."""
    for number, line in lines_of(source):
        if line is None:
            yield number, BadRow(f"{source.name}, line {number}", TOO_LONG), 0
        elif not line.isspace():
            yield number, line, len(line)


def decode_json(line: bytes) -> Record:
    """The record of a line; NaN and infinities become None.

    Raises:
        Unusable: if the line is not UTF-8, not JSON or no record.
    """
    text = decode_utf8(line)
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"not JSON ({error})") from None
    return as_record(value)


def as_record(value: Any) -> Record:
    """The record that a value of JSON is.

    Raises:
        Unusable: if it is none.
    """
    if isinstance(value, dict):
        inner = value.get("row")  # as the server of Hugging Face datasets answers
        return inner if isinstance(inner, dict) and "row_idx" in value else value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value and all(type(i) is int for i in value):
        return {"ids": value}
    raise Unusable("give a JSON object, a text or a list of token ids")


def json_kind(head: bytes, whole: bool, columns: Columns) -> Literal["jsonl", "json"] | None:
    """The layout of a text that may be JSON; None if it is not.

    Args:
        head: the first bytes of the file.
        whole: whether they are all of it.
        columns: the columns that the caller named.
    """
    text = head.decode("utf-8", "ignore").lstrip(_SPACE)
    if text[:1] not in ("{", "["):
        return None
    first, _, others = text.partition("\n")
    try:
        value = _DECODER.decode(first.rstrip())
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        expands = not others.strip() and next(_expanded(value, columns), None)
        return "json" if expands else "jsonl"
    if isinstance(value, list):
        return "jsonl" if value and all(type(i) is int for i in value) else "json"
    second = others.lstrip(_SPACE).partition("\n")[0].strip()
    if _is_object(second):
        return "jsonl"  # the first line is damaged, or a record ends in a comma
    if first_record(text.encode(), columns) is not None:
        return "json"
    if whole or not _LONG_VALUE.match(text):
        return None
    return "jsonl" if text[0] == "{" else "json"  # its first value goes on behind the head


def _is_object(line: str) -> bool:
    try:
        return isinstance(_DECODER.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def first_record(head: bytes, columns: Columns) -> Record | None:
    """The first record of the beginning of a file; None if it has none."""
    try:
        for value in _Values(io.BytesIO(head), columns).records():
            return as_record(value)
    except Unusable:
        pass
    return None


def read_json(source: Source) -> Iterator[RawRow]:
    """Records of a file that is not one record a line, numbered from 1.

    Raises:
        Unusable: where the text stops being JSON; what follows cannot be found.
    """
    with open_text(source.path) as stream:
        for number, value in enumerate(_Values(stream, source.columns).records(), start=1):
            try:
                record = as_record(value)
            except Unusable as problem:
                yield number, BadRow(f"{source.name}, row {number}", str(problem)), 0
            else:
                yield number, record, size_in_bytes(record)


class _Values:
    """The values of a stream of JSON, parsed one after the other.

    The buffer holds what was read and is not parsed yet. A value that does not parse is tried again
    with twice as much text, up to `LIMIT`, so that finding its end costs no more than parsing it
    twice.

    Args:
        stream: the bytes.
        columns: the columns that the caller named, which tell records from what holds them.
    """

    def __init__(self, stream: IO[bytes], columns: Columns) -> None:
        self.stream, self.columns = stream, columns
        self.buffer, self.ended = "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def records(self) -> Iterator[Any]:
        """The values at the top, and those inside an array or an object that holds records."""
        while (sign := self._next_sign(",")) is not None:
            if sign == "[":
                self.buffer = self.buffer[1:]
                yield from self._elements()
            elif sign == "{":
                self.buffer = self.buffer[1:]
                yield from self._object()
            else:
                yield self._value()

    def _elements(self) -> Iterator[Any]:
        """The elements of the array whose bracket was read."""
        while (sign := self._next_sign(",")) != "]":
            if sign is None:
                raise Unusable("not JSON (its end is missing)")
            yield self._value()
        self.buffer = self.buffer[1:]

    def _object(self) -> Iterator[Any]:
        """The object whose bracket was read, or the records that it holds."""
        entries: Record = {}
        n_inside = 0
        while (sign := self._next_sign(",")) != "}":
            key = self._value() if sign == '"' else None
            if key is None or self._next_sign("") != ":":
                raise Unusable("not JSON (a key is missing)")
            self.buffer = self.buffer[1:]
            if self._next_sign("") == "[" and str(key).lower() in CONTAINERS:
                self.buffer = self.buffer[1:]
                for value in self._elements():
                    n_inside += 1
                    yield value
            else:
                entries[key] = self._value()
        self.buffer = self.buffer[1:]
        if is_usable(entries, self.columns) or not n_inside:
            yield from list(_expanded(entries, self.columns)) or [entries]

    def _value(self) -> Any:
        """The value that the buffer begins with."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer)
            except RecursionError:
                raise Unusable("not JSON (it is nested too deeply)") from None
            except ValueError as error:
                if self.ended or len(self.buffer) > LIMIT:
                    reason = TOO_LONG if len(self.buffer) > LIMIT else f"not JSON ({error})"
                    raise Unusable(reason) from None
                self._read(max(HEAD, len(self.buffer)))
                continue
            if end < len(self.buffer) or self.ended:  # else a number may go on
                self.buffer = self.buffer[end:]
                return value
            self._read(HEAD)

    def _next_sign(self, between: str) -> str | None:
        """The next character that is neither space nor one of `between`; None at the end."""
        while True:
            self.buffer = self.buffer.lstrip(_SPACE + between)
            if self.buffer:
                return self.buffer[0]
            if self.ended:
                return None
            self._read(HEAD)

    def _read(self, n_bytes: int) -> None:
        raw = self.stream.read(n_bytes)
        self.ended = not raw
        try:
            self.buffer += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            raise Unusable(f"not UTF-8 text ({error.reason}); {SAVE_AS_UTF8}") from None


def _expanded(entries: Record, columns: Columns) -> Iterator[Record]:
    """The records inside an object: under one of its keys, or spread over its columns."""
    by_case = {key.lower(): key for key in entries}
    text = columns.text or columns.prefix or next((by_case[n] for n in TEXT if n in by_case), None)
    if text is not None and isinstance(entries.get(text), (list, dict)):
        yield from _rows_of_columns(entries, text)
    if is_usable(entries, columns):
        return
    for key, value in entries.items():
        is_list = isinstance(value, list) and value and key.lower() not in CHATS
        if is_list and isinstance(value[0], dict) and is_usable(as_record(value[0]), columns):
            yield from value


def _rows_of_columns(entries: Record, text: str) -> Iterator[Record]:
    """The rows of an object of columns, each a list or an object from row to value."""
    column = entries[text]
    keys = list(column) if isinstance(column, dict) else range(len(column))
    for key in keys:
        row = {}
        for name, values in entries.items():
            if isinstance(values, dict):
                row[name] = values.get(key)
            elif isinstance(values, list) and len(values) == len(keys):
                row[name] = values[key] if isinstance(key, int) else None
            else:
                row[name] = values
        yield row
