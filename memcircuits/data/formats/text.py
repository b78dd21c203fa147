"""Plain text: a file is one document, or holds paragraphs between blank lines.

Nothing in a text says which of the two it is. `"auto"` takes the files of a folder as documents, as
books are kept, and so does a scan with a stride, because passages run across blank lines. A single
file without a stride holds paragraphs. Listings say what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

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

Txt: TypeAlias = Literal["auto", "document", "paragraph"]
"""What a row of a text file is: the whole file, or a paragraph between blank lines."""

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


def read_document(source: Source) -> Iterator[RawRow]:
    """The whole file as one row, together with the name that it gets."""
    lines: list[bytes] = []
    size = 0
    is_blank = True
    for _, line in lines_of(source):
        size += LIMIT + 1 if line is None else len(line)
        is_blank = is_blank and line is not None and not line.strip(_BLANK)
        if size > LIMIT:
            lines = []  # only its size is still needed
        else:
            lines.append(line or b"")
    if size > LIMIT:
        yield 1, BadRow(source.name, TOO_LONG), 0
    elif not is_blank:
        yield 1, (source.stem, b"".join(lines)), size


def decode_document(named: tuple[str, bytes]) -> Record:
    """A record with the name and the text of a file."""
    name, content = named
    return {"id": name, **decode_txt(content)}


def decode_txt(block: bytes) -> Record:
    """A record with the text of a block, without the space around it.

    A byte-order mark stays: normalising takes it away, and counts it.
    """
    mark = "\ufeff" if block.startswith(BYTE_ORDER_MARK) else ""
    return {"text": mark + decode_utf8(block).strip()}
