"""The blocks of a page: prose, headline numbers, facts and tables; and the base of all blocks.

Each block is a frozen dataclass of plain data that checks itself when it is made and names the
template that draws it. A block builds no HTML: it gives its template numbers and text (see
`memcircuits.display.text` for why that keeps the page safe).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from memcircuits.base.errors import InputError
from memcircuits.display.text import MINUS, UNKNOWN, number


class Span(NamedTuple):
    """Marked-up text in `Prose`; made by the functions below."""

    kind: str
    text: str
    href: str = ""


def strong(text: str) -> Span:
    """Important text."""
    return Span("strong", text)


def emphasis(text: str) -> Span:
    """Stressed text."""
    return Span("em", text)


def code(text: str) -> Span:
    """Text as typed: names, commands, tokens."""
    return Span("code", text)


def link(text: str, href: str) -> Span:
    """A link that the reader may follow; the page itself never does.

    Raises:
        InputError: if `href` is neither an `https://` address nor a `#section`.
    """
    if not href.startswith(("https://", "#")):
        raise InputError("href", repr(href), "give an https:// address or a #section of the page")
    return Span("a", text, href)


Paragraph = str | Sequence[str | Span]


@dataclass(frozen=True)
class Block:
    """Base of all blocks: an optional `title` (a heading) and `note` (how to read it)."""

    template: ClassVar[str] = ""
    scripts: ClassVar[tuple[str, ...]] = ()
    title: str = field(default="", kw_only=True)
    note: str = field(default="", kw_only=True)

    def context(self) -> dict[str, Any]:
        """What the template is given."""
        return {}


@dataclass(frozen=True)
class Prose(Block):
    """Paragraphs, each a string or a list of strings and spans.

    Example:
        >>> Prose(["All of it.", ["Head ", code("L1H2"), " is significant."]], title="In short")
        ... # doctest: +ELLIPSIS
        Prose(...)
    """

    template: ClassVar[str] = "prose.html.j2"
    paragraphs: Sequence[Paragraph]

    def context(self) -> dict[str, Any]:
        """Every paragraph as a list of spans."""
        paragraphs = [self.paragraphs] if isinstance(self.paragraphs, str) else self.paragraphs
        return {"paragraphs": [_spans(paragraph) for paragraph in paragraphs]}


def _spans(paragraph: Paragraph) -> list[Span]:
    parts = [paragraph] if isinstance(paragraph, str) else paragraph
    return [Span("", part) if isinstance(part, str) else part for part in parts]


class Number(NamedTuple):
    """One headline number: what it is (`label`), its `value` as shown, and small print."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Numbers(Block):
    """A row of headline numbers."""

    template: ClassVar[str] = "numbers.html.j2"
    items: Sequence[Number]

    def context(self) -> dict[str, Any]:
        """The numbers."""
        return {"items": [Number(*item) for item in self.items]}


@dataclass(frozen=True)
class Facts(Block):
    """Names and values: what was run, on what, with which versions; and how to run it again.

    Attributes:
        items: name -> value, shown in this order.
        commands: shell or Python lines, shown as code to copy.
    """

    template: ClassVar[str] = "facts.html.j2"
    items: Mapping[str, object]
    commands: Sequence[str] = ()

    def context(self) -> dict[str, Any]:
        """Values as text."""
        items = [
            (name, number(value, 4) if isinstance(value, float) else str(value))
            for name, value in self.items.items()
        ]
        return {"items": items, "commands": list(self.commands)}


@dataclass(frozen=True)
class Table(Block):
    """A frame as a table that is sorted by clicking a heading and read page by page.

    Attributes:
        frame: the rows, best first: without scripts and on paper, that order remains. A cell may
            be a `link`.
        labels: headings for column names that are not clear by themselves.
        help: what a column means, in a sentence; shown under "What the columns mean".
        max_rows: maximum number of rows; the page says how many are left out.
        page_size: rows shown at a time.
        digits: significant digits of numbers.
        row_ids: a name for each row, which links can lead to.
    """

    template: ClassVar[str] = "table.html.j2"
    frame: pd.DataFrame
    labels: Mapping[str, str] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    max_rows: int = 1000
    page_size: int = 25
    digits: int = 3
    row_ids: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.row_ids and len(self.row_ids) != len(self.frame):
            raise InputError("row_ids", f"{len(self.row_ids)} names", f"give {len(self.frame)}")
        for name, value in (("max_rows", self.max_rows), ("page_size", self.page_size)):
            if value < 1:
                raise InputError(name, value, "give 1 or more")

    def _cell(self, value: Any) -> dict[str, Any]:
        """The text of a cell, its sort key where that is not the text, and where it leads."""
        if isinstance(value, Span):
            return {**self._cell(value.text), "href": value.href}
        if isinstance(value, (bool, np.bool_)):
            return {"text": "yes" if value else "no", "sort": int(value)}
        if isinstance(value, (int, np.integer)):
            return {"text": f"{value:,}".replace("-", MINUS), "sort": int(value)}
        if isinstance(value, (float, np.floating)):
            text = number(float(value), self.digits)
            return {"text": text, "sort": "" if math.isnan(value) else f"{float(value):.9g}"}
        if value is None or value is pd.NA or value is pd.NaT:
            return {"text": UNKNOWN, "sort": ""}
        text = str(value)
        return {"text": text if len(text) <= 200 else text[:200] + "…", "sort": None}

    def context(self) -> dict[str, Any]:
        """Cells as text and sort key; numeric columns are set flush right."""
        head = self.frame.head(self.max_rows)
        rows = [[self._cell(value) for value in row] for row in head.itertuples(index=False)]
        columns = [
            {
                "long": any(len(row[index]["text"]) > 60 for row in rows),
                "label": self.labels.get(str(name), str(name)),
                "help": self.help.get(str(name), ""),
                "numeric": _is_number(self.frame[name].dtype),
            }
            for index, name in enumerate(self.frame.columns)
        ]
        return {
            "columns": columns,
            "rows": rows,
            "total": len(self.frame),
            "left_out": len(self.frame) - len(head),
            "page_size": self.page_size,
        }


def _is_number(dtype: Any) -> bool:
    return pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype)
