"""What a page is made of: prose, facts, numbers, tables, charts, token strips, attention.

Each block is a frozen dataclass of plain data that checks itself when made and names the template
that draws it. A block builds no HTML: it hands its template numbers and text (see
:mod:`memcircuits.pages.text` for why that keeps the page safe).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from memcircuits.checks import InputError

from . import svg
from .numbers import array, cells, matrix
from .palette import level
from .text import MINUS, UNKNOWN, number, short, visible

if TYPE_CHECKING:
    from .attention import AttentionView
else:
    AttentionView = Any


class Span(NamedTuple):
    """A stretch of marked-up text in :class:`Prose`; made by the functions below."""

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
        InputError: ``href`` is neither an ``https://`` address nor a ``#section``.
    """
    if not href.startswith(("https://", "#")):
        raise InputError("href", repr(href), "give an https:// address or a #section of the page")
    return Span("a", text, href)


Paragraph = str | Sequence[str | Span]


@dataclass(frozen=True)
class Block:
    """Base of all blocks: an optional ``title`` (a heading) and ``note`` (how to read it)."""

    template: ClassVar[str] = ""
    title: str = field(default="", kw_only=True)
    note: str = field(default="", kw_only=True)

    def context(self) -> dict[str, Any]:
        """What the template is given."""
        return {}


@dataclass(frozen=True)
class Prose(Block):
    """Paragraphs, each a string or a list of strings and spans.

    >>> Prose(["All of it.", ["Head ", code("L1H2"), " stands out."]], title="In short")
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
    """One headline number: what it is (``label``), its ``value`` as shown, and small print."""

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
        items: Shown in this order.
        commands: Shell or Python lines, shown as code to copy.
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
        frame: The rows, best first: that order is the order without scripts and on paper.
        labels: Headings for column names that are not clear by themselves.
        help: What a column means, in a sentence; shown under "What the columns mean".
        max_rows: Rows beyond these are left out, and the page says how many.
        page_size: Rows shown at a time.
        digits: Significant digits of numbers.
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


@dataclass(frozen=True)
class Heatmap(Block):
    """A value for each layer and head (or any two axes) as coloured cells.

    Attributes:
        values: Array [row, col]; NaN is shown as not measured.
        name: What the values are, for example "score".
        units: Their unit, for example "nats/token".
        diverging: Blue to orange around zero (default: if any value is negative).
        row_label: Name of the rows' axis; ``col_label`` of the columns'.
        row_names: One per row (default: its number); ``col_names`` likewise.
        marks: Cells framed because they stand out, pairs (row, col) or booleans [row, col];
            ``marks_mean`` says why.
        hover: Further text per cell, [row][col].
    """

    template: ClassVar[str] = "heatmap.html.j2"
    values: Any
    name: str = "value"
    units: str = ""
    diverging: bool | None = None
    row_label: str = "layer"
    col_label: str = "head"
    row_names: Sequence[str] = ()
    col_names: Sequence[str] = ()
    marks: Any = ()
    marks_mean: str = "stands out"
    hover: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """Check shapes and numbers."""
        values = matrix(self.values)
        cells(self.marks, values.shape)
        for name, names, size in (
            ("row_names", self.row_names, values.shape[0]),
            ("col_names", self.col_names, values.shape[1]),
        ):
            if names and len(names) != size:
                raise InputError(name, f"{len(names)} entries", f"give {size}, as values has")

    def context(self) -> dict[str, Any]:
        """Cells with colours, labels and hover text."""
        values = matrix(self.values)
        rows = [str(r) for r in self.row_names or range(values.shape[0])]
        cols = [str(c) for c in self.col_names or range(values.shape[1])]
        units = f" {self.units}" if self.units else ""
        tips = [
            [
                f"{self.row_label} {r}, {self.col_label} {c}: "
                + (
                    "not measured"
                    if math.isnan(values[i, j])
                    else f"{number(float(values[i, j]), 4)}{units}"
                )
                + (f"; {self.hover[i][j]}" if self.hover else "")
                for j, c in enumerate(cols)
            ]
            for i, r in enumerate(rows)
        ]
        chart = svg.heatmap(
            values,
            diverging=bool((values < 0).any()) if self.diverging is None else self.diverging,
            rows=rows,
            cols=cols,
            marks=cells(self.marks, values.shape),
            tips=tips,
            corner=f"{self.row_label}\\{self.col_label}",
        )
        return {"chart": chart}


@dataclass(frozen=True)
class _Chart(Block):
    """A tidy frame as series: one per value of ``by``, in order of appearance.

    Attributes:
        frame: One row per point.
        x: Column along the bottom.
        y: Column of heights.
        by: Column that tells series apart.
        low: Column with the lower end of each point's interval; ``high`` with the upper.
        x_label: What ``x`` is (default: the column's name); ``y_label`` likewise.
        units: Unit of ``y``.
    """

    frame: pd.DataFrame
    x: str
    y: str
    by: str | None = None
    low: str | None = None
    high: str | None = None
    x_label: str = ""
    y_label: str = ""
    units: str = ""

    def __post_init__(self) -> None:
        """Check that the columns exist and that there is something to draw."""
        for name in ("x", "y", "by", "low", "high"):
            column = getattr(self, name)
            if column is not None and column not in self.frame.columns:
                there = ", ".join(str(c) for c in self.frame.columns)
                raise InputError(name, repr(column), f"give a column of frame: {there}")
        if not len(self.frame):
            raise InputError("frame", "no rows", "leave the block out: there is nothing to draw")

    def _series(self) -> list[svg.Series]:
        groups = [("", self.frame)]
        if self.by is not None:
            # Not groupby: pandas' strings refuse what tokens may hold, such as half an emoji.
            keys = self.frame[self.by].tolist()
            groups = [
                (str(key), self.frame[[other == key for other in keys]])
                for key in dict.fromkeys(keys)
            ]
        return [
            svg.Series(
                name,
                group[self.x].tolist(),
                group[self.y].astype(float).tolist(),
                group[self.low].astype(float).tolist() if self.low else None,
                group[self.high].astype(float).tolist() if self.high else None,
            )
            for name, group in groups
        ]

    def _labels(self) -> dict[str, str]:
        y_label = self.y_label or self.y
        return {
            "x_label": self.x_label or self.x,
            "y_label": f"{y_label} ({self.units})" if self.units else y_label,
        }


@dataclass(frozen=True)
class Lines(_Chart):
    """Lines with a band for each interval; ``log_x`` for repetition counts and ranks."""

    template: ClassVar[str] = "chart.html.j2"
    log_x: bool = False

    def __post_init__(self) -> None:
        """Check, also that a logarithm can be taken."""
        super().__post_init__()
        if self.log_x and not (self.frame[self.x] > 0).all():
            raise InputError("log_x", True, f"column {self.x!r} holds 0 or less: give log_x=False")

    def context(self) -> dict[str, Any]:
        """Coordinates."""
        labels = self._labels()
        chart = svg.lines(
            self._series(), log_x=self.log_x, x_label=labels["x_label"], units=self.units
        )
        return {"chart": chart, "kind": "lines", **labels, "frame": svg.FRAME}


@dataclass(frozen=True)
class Bars(_Chart):
    """Grouped bars from zero, with whiskers for intervals."""

    template: ClassVar[str] = "chart.html.j2"

    def context(self) -> dict[str, Any]:
        """Coordinates."""
        labels = self._labels()
        chart = svg.bars(self._series(), x_label=labels["x_label"], units=self.units)
        return {"chart": chart, "kind": "bars", **labels, "frame": svg.FRAME}


@dataclass(frozen=True)
class Strip:
    """One number per token, to colour a paragraph by: its ``values`` and ``units``.

    NaN means undefined (the first token has no log-probability) and stays uncoloured. A
    log-probability is read from zero downwards: ``reverse`` gives the lowest value the darkest
    colour.
    """

    values: Sequence[float]
    units: str = ""
    reverse: bool = False

    def levels(self) -> list[int | None]:
        """The colour level of each token."""
        values = array(self.values)
        values = -values if self.reverse else values
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        return [level(float(v), float(low), float(high)) for v in values]

    def check(self, name: str, n_tokens: int) -> None:
        """Refuse a strip that does not fit its tokens.

        Raises:
            InputError: Another length, or an infinite value.
        """
        values = array(self.values)
        if values.shape != (n_tokens,):
            raise InputError(
                f"strip {name!r}", f"shape {values.shape}", f"give {n_tokens} values, one per token"
            )
        if np.isinf(values).any():
            raise InputError(f"strip {name!r}", "infinite", "clip it, or give NaN")


def strip_tokens(
    tokens: Sequence[str],
    n_prefix: int,
    strips: Mapping[str, Strip],
    others: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """What the strip template shows for each token: text, part, hover text, first colour.

    Where ``others`` are given, tokens of the prefix are marked that differ from those at their
    place there, and the first one of the continuation: behind it there is nothing to compare.
    """
    first = next(iter(strips.values())).levels() if strips else [None] * len(tokens)
    shown = []
    parted = False
    for index, token in enumerate(tokens):
        told = [
            f"{name} {number(float(array(s.values)[index]))} {s.units}".strip()
            for name, s in strips.items()
        ]
        differs = others is not None and not parted and (list(others[index : index + 1]) != [token])
        parted = parted or (differs and index >= n_prefix)
        if differs:
            told.append("differs from the paragraph beside it")
        shown.append(
            {
                "differs": differs,
                "text": visible(token),
                "index": index,
                "prefix": index < n_prefix,
                "level": first[index],
                "tip": "; ".join([f"token {index} “{visible(token, 24, tell=False)}”", *told]),
            }
        )
    return shown


@dataclass(frozen=True)
class Tokens(Block):
    """A paragraph's tokens, coloured by one number each; prefix and continuation told apart.

    Attributes:
        tokens: Text of each token.
        strip: The numbers.
        name: What they are.
        n_prefix: How many tokens were given as prompt.
    """

    template: ClassVar[str] = "tokens.html.j2"
    tokens: Sequence[str]
    strip: Strip
    name: str
    n_prefix: int = 0

    def __post_init__(self) -> None:
        """Check lengths and numbers."""
        self.strip.check(self.name, len(self.tokens))

    def context(self) -> dict[str, Any]:
        """Tokens with colours, and the ends of the scale."""
        return {
            "tokens": strip_tokens(self.tokens, self.n_prefix, {self.name: self.strip}),
            "n_prefix": self.n_prefix,
            "scale": strip_scale(self.strip),
            "name": self.name,
            "units": self.strip.units,
        }


def strip_scale(strip: Strip) -> list[str]:
    """The values at the pale and at the dark end of a strip's colours, as text."""
    values = array(strip.values)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [UNKNOWN, UNKNOWN]
    ends = [short(float(finite.min())), short(float(finite.max()))]
    return ends[::-1] if strip.reverse else ends


@dataclass(frozen=True)
class Attention(Block):
    """An :class:`~memcircuits.pages.AttentionView`, drawn when the reader gets there."""

    template: ClassVar[str] = "attention.html.j2"
    view: AttentionView

    def context(self) -> dict[str, Any]:
        """The view, and the one it is compared with."""
        compare = self.view.compare
        if compare is None:
            return {"views": [self.view.context()]}
        return {"views": [self.view.context(compare), compare.context(self.view)]}
