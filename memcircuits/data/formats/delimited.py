"""Tables as text: columns between commas, tabs, semicolons or bars, the names in the first line.

Which of these separates the columns is told by the first line: that under which it names a column
that can hold text or token ids. Spreadsheets say it in a line `sep=;` of its own. Fields in quotes
may hold separators and line ends, with quotes doubled. Many tables between tabs know no quotes:
where a field of the first lines begins with one and does not end with it, quotes are characters.

A table that stops being CSV, mostly by a quote inside a field that is not doubled, cannot be read
on: where the next record begins is not known. What follows is reported as not read.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
from collections.abc import Iterator
from typing import Any

from memcircuits.data.formats.columns import (
    AS_TEXT,
    check_columns,
    is_usable,
    unique_columns,
)
from memcircuits.data.formats.opening import BYTE_ORDER_MARK, head_of, lines_of
from memcircuits.data.formats.records import (
    LIMIT,
    TOO_LONG,
    BadRow,
    Columns,
    RawRow,
    Record,
    Source,
    Unusable,
)

DELIMITERS = ",\t;|"

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d{1,3})?")
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[\w .#-]{1,40}")


def read_csv(source: Source) -> Iterator[RawRow]:
    """Records by the names in the first line; a record may span several lines.

    Raises:
        Unusable: at the first line that is too long or not CSV: where the next record begins cannot
            be known.
    """
    head = head_of(source.path)[0].decode("utf-8", "replace").lstrip("\ufeff")
    delimiter = delimiter_of(head, source.columns) or _likeliest_delimiter(head)
    text_lines = _TextLines(source)
    rules: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    if _has_plain_quotes(head, delimiter):
        rules["quoting"] = csv.QUOTE_NONE
    reader = csv.reader(text_lines, **rules)
    header: list[str] | None = None
    while True:
        start, text_lines.size = reader.line_num + 1, 0
        try:
            with _wide_fields():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Unusable(
                f"line {start} is not CSV ({error}); double the quotes inside quoted fields"
            ) from None
        if header is None:
            if start == 1 and _SEPARATOR_LINE.fullmatch(head.partition("\n")[0]):
                continue
            header = unique_columns(fields)
            check_columns(header, source.columns)
        elif len(fields) == len(header):
            yield start, dict(zip(header, fields, strict=True)), text_lines.size
        elif fields:
            reason = f"{len(fields)} fields where the header has {len(header)}"
            yield start, BadRow(f"{source.name}, line {start}", reason), text_lines.size


def decode_csv(record: dict[str, str]) -> Record:
    """The record with numbers as numbers; texts and names stay as they are written."""
    return {
        key: value if key.strip().lower() in AS_TEXT else _number(value)
        for key, value in record.items()
    }


def delimiter_of(head: str, columns: Columns, *, plain: bool = False) -> str | None:
    """What separates the columns; None if the first line names no column that can be used.

    Args:
        head: the beginning of the file.
        columns: the columns that the caller named.
        plain: take only a header of two or more short names, as nobody begins a text.
    """
    first, _, others = head.partition("\n")
    separator = _SEPARATOR_LINE.fullmatch(first)
    if separator:
        first = others.partition("\n")[0]
    best, most = None, 0
    for delimiter in separator[1] if separator else DELIMITERS:
        names = _fields(first, delimiter)
        if plain and (len(names) < 2 or not all(map(_PLAIN_NAME.fullmatch, names))):
            continue
        if len(names) > most and is_usable(names, columns):
            best, most = delimiter, len(names)
    return best


def _likeliest_delimiter(head: str) -> str:
    """The separator that gives the first line the most columns."""
    first = head.partition("\n")[0]
    return max(DELIMITERS, key=lambda delimiter: len(_fields(first, delimiter)))


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r")], delimiter=delimiter), [])
    except csv.Error:
        return []


def _has_plain_quotes(head: str, delimiter: str) -> bool:
    """Whether quotes are characters like others: between tabs, where some do not close."""
    if delimiter != "\t":
        return False
    lines = [line.rstrip("\r").split("\t") for line in head.split("\n")[:-1]]
    if any(len(fields) != len(lines[0]) for fields in lines):
        return False
    quoted = [field for fields in lines for field in fields if field.startswith('"')]
    return any(len(field) < 2 or not field.endswith('"') for field in quoted)


class _TextLines:
    """The lines of a file as text, and how many bytes were taken since `size` was set to 0."""

    def __init__(self, source: Source) -> None:
        self._lines = lines_of(source)
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        if line is None:
            raise Unusable(f"line {number} is {TOO_LONG}")
        self.size += len(line)
        # Bytes that are not UTF-8 become lone surrogates, which `make_row` refuses row by row.
        return line.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _wide_fields() -> Iterator[None]:
    """Let the csv module take long fields for one row: its limit is global to the process."""
    before = csv.field_size_limit(LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _number(text: str) -> Any:
    """The number that a text writes in its usual form; any other text as it is (`007` too)."""
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    _, decimals, exponent = number.groups()
    if not (decimals or exponent):
        return int(text)
    return float(text) if math.isfinite(float(text)) else text
