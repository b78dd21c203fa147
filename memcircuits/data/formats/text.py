"""TODO."""

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
    Source,
    Unusable,
    check_columns,
    damage,
    decode_utf8,
)

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d{1,3})?")


def _lines(source: Source) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is too long."""
    import pyarrow as pa

    codec = COMPRESSION.get(Path(source.path).suffix)
    with damage(), contextlib.ExitStack() as stack:
        raw = stack.enter_context(pa.input_stream(source.path, compression=codec))
        stream = stack.enter_context(io.BufferedReader(raw, 2**16))
        number = 0
        while line := stream.readline(LIMIT + 1):
            number += 1
            if len(line) <= LIMIT:
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = stream.readline(LIMIT)
            yield number, None


def read_jsonl(source: Source) -> Iterator[tuple[int, Any, int]]:
    for number, line in _lines(source):
        if line is None:
            yield number, BadRow(f"{source.name}, line {number}", TOO_LONG), 0
        elif not line.isspace():
            yield number, line, len(line)


def decode_json(line: bytes) -> dict[str, Any]:
    text = decode_utf8(line)
    try:
        record = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise Unusable("give a JSON object a line")
    return record


def read_txt(source: Source) -> Iterator[tuple[int, Any, int]]:
    """Blocks between blank lines."""
    block: list[bytes] = []
    start = size = 0

    def found() -> tuple[int, Any, int]:
        if size > LIMIT:
            return start, BadRow(f"{source.name}, line {start}", TOO_LONG), 0
        return start, b"".join(block), size

    for number, line in _lines(source):
        if line is not None and not line.strip(b"\xef\xbb\xbf \t\r\n\f\v"):
            if size:
                yield found()
            block, size = [], 0
            continue
        if not size:
            start = number
        size += LIMIT + 1 if line is None else len(line)
        if size > LIMIT:
            block = []
        else:
            block.append(line or b"")
    if size:
        yield found()


def decode_txt(block: bytes) -> dict[str, Any]:
    return {"text": decode_utf8(block).strip()}


def read_csv(source: Source) -> Iterator[tuple[int, Any, int]]:
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for number, line in _lines(source):
            if line is None:
                raise Unusable(f"line {number} is {TOO_LONG}")
            size += len(line)
            # Bytes that are no UTF-8 become lone surrogates, which `_text` refuses row by row.
            yield line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
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
    """Let the csv module take long fields for one row; its limit is one for the whole process."""
    before = csv.field_size_limit(LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def decode_csv(record: dict[str, str]) -> dict[str, Any]:
    return {k: v if k in (*TEXT, *NAMES) else _number(v) for k, v in record.items()}


def _number(text: str) -> Any:
    """Numbers as numbers, everything else as it is written (`007` too)."""
    found = _NUMBER.fullmatch(text)
    if not found:
        return text
    if not (found[2] or found[3]):
        return int(text)
    return float(text) if math.isfinite(float(text)) else text
