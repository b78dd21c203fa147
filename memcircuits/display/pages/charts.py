"""Charts on a page: a heatmap of any matrix, lines and bars of a tidy frame.

They are inline SVG (`memcircuits.display.pages.svg`), which needs no script and prints sharply.
`memcircuits.display.figures` draws the same measurements with plotly, for notebooks and papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from memcircuits.base.errors import InputError
from memcircuits.display.numbers import cells, matrix
from memcircuits.display.pages import svg
from memcircuits.display.pages.blocks import Block
from memcircuits.display.pages.svg_heatmap import Cells, Scale, heatmap
from memcircuits.display.text import number


@dataclass(frozen=True)
class Heatmap(Block):
    """A value for each layer and head (or any two axes) as coloured cells.

    Attributes:
        values: array [row, col]; NaN is shown as not measured.
        name: what the values are, for example "score".
        units: their unit, for example "nats/token".
        diverging: colours from blue to orange around zero (default: if any value is negative).
        row_label: name of the rows' axis; `col_label` of the columns'.
        row_names: one per row (default: its number); `col_names` likewise.
        marks: cells to frame, such as significant ones, pairs (row, col) or booleans [row, col];
            `marks_mean` says why.
        hover: further text per cell, [row][col].
        cell_names: what each cell is called, [row][col]; a cell then links to the place of that
            name on the page, and arrow keys move between cells.
        n_apart: number of the last columns to draw apart, such as the MLP's beside the heads'.
        scale: `linear`, or `square root`: a few large values then leave colours to the others.
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
    marks_mean: str = "significant"
    hover: Sequence[Sequence[str]] = ()
    cell_names: Sequence[Sequence[str]] = ()
    n_apart: int = 0
    scale: Scale = "linear"

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
        if not 0 <= self.n_apart < values.shape[1]:
            remedy = f"give a number from 0 to {values.shape[1] - 1}"
            raise InputError("n_apart", self.n_apart, remedy)

    def context(self) -> dict[str, Any]:
        """Cells with colours, labels and hover text."""
        values = matrix(self.values)
        rows = [str(name) for name in self.row_names or range(values.shape[0])]
        cols = [str(name) for name in self.col_names or range(values.shape[1])]
        names = self.cell_names or [
            [f"{self.row_label} {row}, {self.col_label} {col}" for col in cols] for row in rows
        ]
        main = Cells(
            values,
            self._is_diverging(values),
            [
                [f"{name}: {self._cell(values, i, j)}" for j, name in enumerate(row)]
                for i, row in enumerate(names)
            ],
            self.cell_names,
            cells(self.marks, values.shape),
            self.scale,
        )
        chart = heatmap(
            main,
            rows=rows,
            cols=cols,
            corner=f"{self.row_label}\\{self.col_label}",
            n_apart=self.n_apart,
        )
        return {"chart": chart}

    def _is_diverging(self, values: np.ndarray) -> bool:
        return bool((values < 0).any()) if self.diverging is None else self.diverging

    def _cell(self, values: np.ndarray, row: int, col: int) -> str:
        value = float(values[row, col])
        units = f" {self.units}" if self.units else ""
        text = "not measured" if math.isnan(value) else f"{number(value, 4)}{units}"
        return f"{text}; {self.hover[row][col]}" if self.hover else text


@dataclass(frozen=True)
class Chart(Block):
    """Base of charts of a tidy frame: one series per value of `by`, in order of appearance.

    Attributes:
        frame: one row per point.
        x: column along the bottom.
        y: column of heights.
        by: column that names the series.
        low: column with the lower end of each point's interval; `high` with the upper.
        x_label: what `x` is (default: the column's name); `y_label` likewise.
        units: unit of `y`.
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
                columns = ", ".join(str(c) for c in self.frame.columns)
                raise InputError(name, repr(column), f"give a column of frame: {columns}")
        if not len(self.frame):
            raise InputError("frame", "no rows", "leave the block out: there is nothing to draw")

    def _series(self) -> list[svg.Series]:
        groups = [("", self.frame)]
        if self.by is not None:
            # Not groupby: pandas' strings refuse what tokens may hold, such as half an emoji.
            keys = self.frame[self.by].tolist()
            groups = [
                (str(name), self.frame[[key == name for key in keys]])
                for name in dict.fromkeys(keys)
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

    def axis_labels(self) -> dict[str, str]:
        """What stands at the axes, `x_label` and `y_label`, with the unit."""
        y_label = self.y_label or self.y
        return {
            "x_label": self.x_label or self.x,
            "y_label": f"{y_label} ({self.units})" if self.units else y_label,
        }


@dataclass(frozen=True)
class Lines(Chart):
    """Lines with a band for each interval; `log_x` for repetition counts and ranks."""

    template: ClassVar[str] = "chart.html.j2"
    log_x: bool = False

    def __post_init__(self) -> None:
        """Check, also that a logarithm can be taken."""
        super().__post_init__()
        if self.log_x and not (self.frame[self.x] > 0).all():
            raise InputError("log_x", True, f"column {self.x!r} holds 0 or less: give log_x=False")

    def context(self) -> dict[str, Any]:
        """Coordinates."""
        labels = self.axis_labels()
        chart = svg.lines(
            self._series(), log_x=self.log_x, x_label=labels["x_label"], units=self.units
        )
        return {"chart": chart, "kind": "lines", **labels, "frame": svg.FRAME}


@dataclass(frozen=True)
class Bars(Chart):
    """Grouped bars from zero, with whiskers for intervals."""

    template: ClassVar[str] = "chart.html.j2"

    def context(self) -> dict[str, Any]:
        """Coordinates."""
        labels = self.axis_labels()
        chart = svg.bars(self._series(), x_label=labels["x_label"], units=self.units)
        return {"chart": chart, "kind": "bars", **labels, "frame": svg.FRAME}
