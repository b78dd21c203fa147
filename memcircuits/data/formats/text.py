"""Plain text: paragraphs between blank lines."""

from __future__ import annotations

from collections.abc import Iterator

from memcircuits.data.formats.opening import BYTE_ORDER_MARK, lines_of
from memcircuits.data.formats.records import (
    LIMIT,
    TOO_LONG,
    BadRow,
    RawRow,
    Record,
    Source,
    decode_utf8,
)

_BLANK = BYTE_ORDER_MARK + b" \t\r\n\f\v"


def read_txt(source: Source) -> Iterator[RawRow]:
    """Blocks between blank lines, numbered by their first line."""
    block: list[bytes] = []
    start = size = 0

    def finished_block() -> RawRow:
        if size > LIMIT:
            return start, BadRow(f"{source.name}, line {start}", TOO_LONG), 0
        return start, b"".join(block), size

    for number, line in lines_of(source):
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
    """A record with the text of a block, without the space around it.

    A byte-order mark stays: normalising takes it away, and counts it.
    """
    mark = "\ufeff" if block.startswith(BYTE_ORDER_MARK) else ""
    return {"text": mark + decode_utf8(block).strip()}
