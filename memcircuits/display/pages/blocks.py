"""What a page is made of: prose, facts, numbers, tables, charts, token strips, attention.

Each block is a frozen dataclass of plain data that checks itself when made and names the template
that draws it. A block builds no HTML: it hands its template numbers and text (see
`memcircuits.display.text` for why that keeps the page safe).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from memcircuits.core.errors import InputError
from memcircuits.display.text import MINUS, UNKNOWN, number


class Span(NamedTuple):
    """A stretch of marked-up text in `Prose`; made by the functions below."""

    kind: str
    text: str
    href: str = ""


def strong(text: str) -> Span:
    """Text of weight."""
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
        InputError: `href` is neither an `https://` address nor a `#section`.
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

    >>> Prose(["All of it.", ["Head ", code("L1H2"), " is significant."]], title="In short")
    ... # doctest: +ELLIPSIS
    Prose(...)
    """

    template: ClassVar[str] = "prose.html.j2"
    paragraphs: Sequence[Paragraph]

    def context(self) -> dict[str, Any]:
        """Every paragraph as a list of spans."""
        given = [self.paragraphs] if isinstance(self.paragraphs, str) else self.paragraphs
        spans = [
            [Span("", part) if isinstance(part, str) else part for part in paragraph]
            if not isinstance(paragraph, str)
            else [Span("", paragraph)]
            for paragraph in given
        ]
        return {"paragraphs": spans}


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
        items: shown in this order.
        commands: shell or Python lines, shown as code to copy.
    """

    template: ClassVar[str] = "facts.html.j2"
    items: Mapping[str, object]
    commands: Sequence[str] = ()

    def context(self) -> dict[str, Any]:
        """Values as text."""
        return {
            "items": [
                (k, number(v, 4) if isinstance(v, float) else str(v)) for k, v in self.items.items()
            ],
            "commands": list(self.commands),
        }


@dataclass(frozen=True)
class Table(Block):
    """A frame as a table that is sorted by clicking a heading and read page by page.

    Attributes:
        frame: the rows, best first: that order is the order without scripts and on paper.
        labels: headings for column names that are not clear by themselves.
        help: what a column means, in a sentence; shown under "What the columns mean".
        max_rows: rows beyond these are left out, and the page says how many.
        page_size: rows shown at a time.
        digits: significant digits of numbers.
    """

    template: ClassVar[str] = "table.html.j2"
    frame: pd.DataFrame
    labels: Mapping[str, str] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    max_rows: int = 1000
    page_size: int = 25
    digits: int = 3

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name, value in (("max_rows", self.max_rows), ("page_size", self.page_size)):
            if value < 1:
                raise InputError(name, value, "give 1 or more")

    def _cell(self, value: Any) -> dict[str, Any]:
        """What a cell shows, and the number it is sorted by where that is not the same."""
        if isinstance(value, (bool, np.bool_)):
            return {"text": "yes" if value else "no", "sort": int(value)}
        if isinstance(value, (int, np.integer)):
            return {"text": f"{value:,}".replace("-", MINUS), "sort": int(value)}
        if isinstance(value, (float, np.floating)):
            shown = number(float(value), self.digits)
            return {"text": shown, "sort": "" if math.isnan(value) else f"{float(value):.9g}"}
        if value is None or value is pd.NA or value is pd.NaT:
            return {"text": UNKNOWN, "sort": ""}
        text = str(value)
        return {"text": text if len(text) <= 200 else text[:200] + "…", "sort": None}

    def context(self) -> dict[str, Any]:
        """Cells as text and sort key; numeric columns are set flush right."""
        shown = self.frame.head(self.max_rows)
        rows = [[self._cell(v) for v in row] for row in shown.itertuples(index=False)]
        columns = [
            {
                "long": any(len(row[place]["text"]) > 60 for row in rows),
                "label": self.labels.get(str(name), str(name)),
                "help": self.help.get(str(name), ""),
                "numeric": pd.api.types.is_numeric_dtype(self.frame[name].dtype)
                and not pd.api.types.is_bool_dtype(self.frame[name].dtype),
            }
            for place, name in enumerate(self.frame.columns)
        ]
        return {
            "columns": columns,
            "rows": rows,
            "total": len(self.frame),
            "left_out": len(self.frame) - len(shown),
            "page_size": self.page_size,
        }
