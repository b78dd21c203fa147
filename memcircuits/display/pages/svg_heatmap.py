"""Where the cells of a heat map go, and which colour and text each one has.

Across, places are percentages of the chart's width, so that it is as wide as the page while text
keeps its size; down, they are pixels. All cells share one scale: the same colour is the same value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from memcircuits.display.pages.svg import clip, label_step
from memcircuits.display.palette import N_LEVELS, level
from memcircuits.display.text import MINUS, UNKNOWN, short

PAGE = 1060  # width of a page's column, pixels
TOP = 22  # above the cells, for the names of columns


Scale = Literal["linear", "square root"]


@dataclass(frozen=True)
class Cells:
    """A matrix as it is drawn.

    Attributes:
        values: [row, col]; NaN means not measured.
        diverging: colours around zero, from blue to orange.
        tips: hover text, [row][col].
        names: what the cells are called, [row][col]; they link to places of that name. May be
            empty.
        marks: cells to frame, pairs (row, col).
        scale: how colours grow with values; see `Heatmap`.
    """

    values: np.ndarray
    diverging: bool
    tips: Sequence[Sequence[str]]
    names: Sequence[Sequence[str]] = ()
    marks: Sequence[tuple[int, int]] = ()
    scale: Scale = "linear"

    @property
    def range(self) -> tuple[float, float]:
        """The values at the ends of the scale: around zero, or from zero unless that hides data."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if self.diverging:
            limit = max(abs(low), abs(high)) or 1.0
            return -limit, limit
        return (0.0, high) if 0 <= low < 0.5 * high else (low, high)

    def legend(self) -> dict[str, Any]:
        """The colours from the lowest to the highest value, and both as text."""
        low, high = self.range
        kind = "d" if self.diverging else "s"
        ramp = [f"{kind}{i}" for i in range(N_LEVELS)]
        return {"ramp": ramp, "low": short(low), "high": short(high)}

    @cached_property
    def decimals(self) -> int:
        """Digits behind the point in cells, which then compare: three digits of the upper end.

        Two if it lies below 1, where the zero before the point takes a place; none of counts.
        """
        finite = self.values[np.isfinite(self.values)]
        high = abs(self.range[1])
        if not high or (finite == np.rint(finite)).all():
            return 0
        power = math.floor(math.log10(high))
        return max(0, (2 if power >= 0 else 1) - power)

    def draw(self, row: int, col: int, room: int) -> dict[str, Any]:
        """Colour, text of at most `room` characters and hover text of one cell."""
        value = float(self.values[row, col])
        shade = level(*map(self._scaled, (value, *self.range)))
        kind = "d" if self.diverging else "s"
        return {
            "shade": "none" if shade is None else f"{kind}{shade}",
            "text": in_cell(value, self.decimals, room),
            "marked": (row, col) in self.marks,
            "tip": self.tips[row][col],
            "name": self.names[row][col] if self.names else "",
            "row": row,
        }

    def _scaled(self, value: float) -> float:
        return value if self.scale == "linear" else math.copysign(math.sqrt(abs(value)), value)


def heatmap(
    cells: Cells,
    *,
    rows: Sequence[str],
    cols: Sequence[str],
    corner: str,
    n_apart: int = 0,
) -> dict[str, Any]:
    """Everything that the template of heat maps needs.

    Args:
        cells: the matrix.
        rows: names of the rows, the first one at the bottom.
        cols: names of the columns.
        corner: names of both axes.
        n_apart: number of the last columns, which are drawn apart from the others.
    """
    n_rows, n_all = cells.values.shape
    n_cols = n_all - n_apart
    rows, cols = [clip(name) for name in rows], [clip(name) for name in cols]
    gutter = max(16 + 8 * max(len(name) for name in rows), 10 + 6 * len(corner))
    slots = [j if j < n_cols else j + 0.5 for j in range(n_all)]
    n_slots = slots[-1] + 1
    side = max(14.0, min(64.0 if n_cols < 6 else 160.0, (PAGE - gutter) / n_slots))
    height = next(pixels for limit, pixels in _HEIGHTS if n_rows <= limit)
    width = gutter + n_slots * side
    room = int(side / 7) if min(side, height + 12) >= 34 else 0
    across = 100 / width

    def place(drawn: dict[str, Any], slot: float) -> dict[str, Any]:
        y = TOP + (n_rows - 1 - drawn["row"]) * height
        x = (gutter + slot * side) * across
        return {**drawn, "x": _round(x), "y": y, "middle": _round(x + side * across / 2)}

    placed = [
        [place({**cells.draw(i, j, room), "col": j}, slots[j]) for j in range(n_all)]
        for i in range(n_rows)
    ]
    every = label_step(cols[:n_cols], max(side, 22))
    return {
        # Rows from the top, as they are read.
        "cells": [cell for row in placed[::-1] for cell in row],
        "side": _round(side * across),
        "row_height": height,
        "width": round(width),
        "height": TOP + n_rows * height + 4,
        "least": round(gutter + n_slots * min(side, 22)),
        "is_wide": n_cols >= 6,
        "is_dense": n_cols > 8,
        "gutter": _round((gutter - 6) * across),
        "corner": corner,
        "rows": [
            {"at": TOP + (n_rows - 1 - i) * height + height / 2, "text": name}
            for i, name in enumerate(rows)
        ],
        "cols": [
            {"at": _round((gutter + (slot + 0.5) * side) * across), "text": name}
            for i, (slot, name) in enumerate(zip(slots, cols, strict=True))
            if i % every == 0 or i >= n_cols
        ],
        **cells.legend(),
        "gaps": bool(np.isnan(cells.values).any()),
    }


_HEIGHTS = ((8, 36), (16, 28), (32, 20), (10**9, 15))
"""Maximum number of rows, and how high each of them is in pixels."""


def _round(percent: float) -> float:
    return round(percent, 3)


def in_cell(value: float, decimals: int, room: int) -> str:
    """A value with `decimals` digits after the decimal point; empty if longer than `room`."""
    if not room:
        return ""
    if math.isnan(value):
        return UNKNOWN
    shown = f"{round(value, decimals) + 0.0:.{decimals}f}"  # no minus zero
    if len(shown) > min(room, 7):
        shown = f"{value:.0e}"
    return shown.replace("-", MINUS) if len(shown) <= room else ""
