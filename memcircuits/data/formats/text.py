"""Readers of text files: JSON lines, CSV and plain text, compressed or not.

Reading and decoding are separate. A `read_...` function only finds where rows begin and end, which
costs little, so that a resumed scan passes over the rows that are already done; a `decode_...`
function parses one row. Files are streamed: no more than one row is held in memory, and a line or
block longer than `LIMIT` bytes is passed over and becomes a `BadRow`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memcircuits.data.formats.records import (
    COMPRESSION,
    LIMIT,
    NAMES,
    TEXT,
    TOO_LONG,
    BadRow,
    RawRow,
    Record,
    Source,
    Unusable,
    check_columns,
    decode_utf8,
    errors_as_unusable,
)

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d{1,3})?")
_BLANK = b"\xef\xbb\xbf \t\r\n\f\v"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _lines(source: Source) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is too long."""
    import pyarrow as pa

    codec = COMPRESSION.get(Path(source.path).suffix)
    with errors_as_unusable(), contextlib.ExitStack() as stack:
        raw = stack.enter_context(pa.input_stream(source.path, compression=codec))
        stream = stack.enter_context(io.BufferedReader(raw, 2**16))
        number = 0
        while line := stream.readline(LIMIT + 1):
            number += 1
            if len(line) <= LIMIT:
                yield number, line
                continue
            # Pass over the remainder of the line without keeping it.
            while line and not line.endswith(b"\n"):
                line = stream.readline(LIMIT)
            yield number, None


def read_jsonl(source: Source) -> Iterator[RawRow]:
    """Lines that are not blank."""
    for number, line in _lines(source):
        if line is None:
            yield number, BadRow(f"{source.name}, line {number}", TOO_LONG), 0
        elif not line.isspace():
            yield number, line, len(line)


def decode_json(line: bytes) -> Record:
    """The object of a line; NaN and infinities become None.

    Raises:
        Unusable: if the line is not UTF-8, not JSON or not an object.
    """
    text = decode_utf8(line)
    try:
        record = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise Unusable("give a JSON object a line")
    return record


def read_txt(source: Source) -> Iterator[RawRow]:
    """Blocks between blank lines, numbered by their first line."""
    block: list[bytes] = []
    start = size = 0

    def finished_block() -> RawRow:
        if size > LIMIT:
            return start, BadRow(f"{source.name}, line {start}", TOO_LONG), 0
        return start, b"".join(block), size

    for number, line in _lines(source):
        if line is not None and not line.strip(_BLANK):
            if size:
                yield finished_block()
            block, size = [], 0
            continue
        if not size:
            start = number
        size += LIMIT + 1 if line is None else len(line)
        if size > LIMIT:
            block = []  # only its size is still needed
        else:
            block.append(line or b"")
    if size:
        yield finished_block()


def decode_txt(block: bytes) -> Record:
    """A record with the text of a block, without the space around it."""
    return {"text": decode_utf8(block).strip()}


def read_csv(source: Source) -> Iterator[RawRow]:
    """Records by the names in the first line; a record may span several lines.

    Raises:
        Unusable: at the first line that is too long or not CSV: where the next record begins cannot
            be known.
    """
    size = 0

    def text_lines() -> Iterator[str]:
        nonlocal size
        for number, line in _lines(source):
            if line is None:
                raise Unusable(f"line {number} is {TOO_LONG}")
            size += len(line)
            # Bytes that are not UTF-8 become lone surrogates, which `make_row` refuses row by row.
            yield line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")

    reader = csv.reader(text_lines(), strict=True)
    header: list[str] | None = None
    while True:
        start, size = reader.line_num + 1, 0
        try:
            with _wide_fields():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Unusable(f"line {start} is not CSV ({error})") from None
        if header is None:
            header = fields
            check_columns(header)
        elif len(fields) == len(header):
            yield start, dict(zip(header, fields, strict=True)), size
        elif fields:
            reason = f"{len(fields)} fields where the header has {len(header)}"
            yield start, BadRow(f"{source.name}, line {start}", reason), size


@contextlib.contextmanager
def _wide_fields() -> Iterator[None]:
    """Let the csv module take long fields for one row: its limit is global to the process."""
    before = csv.field_size_limit(LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def decode_csv(record: dict[str, str]) -> Record:
    """The record with numbers as numbers; texts and names stay as they are written."""
    return {
        key: value if key in (*TEXT, *NAMES) else _number(value) for key, value in record.items()
    }


def _number(text: str) -> Any:
    """The number that a text writes in its usual form; any other text as it is (`007` too)."""
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    _, decimals, exponent = number.groups()
    if not (decimals or exponent):
        return int(text)
    return float(text) if math.isfinite(float(text)) else text
