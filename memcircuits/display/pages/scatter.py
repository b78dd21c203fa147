"""A cloud of points on a page: one measure against another, each point with a name and a place.

Points of a series share colour and marker. A point that has a place on the page is a link to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memcircuits.base.errors import InputError
from memcircuits.display.pages import svg
from memcircuits.display.pages.charts import Chart
from memcircuits.display.palette import SERIES
from memcircuits.display.text import number, short

MAX_POINTS = 3000
"""Maximum number of points of one chart: a browser scrolls no more of them smoothly."""


@dataclass(frozen=True)
class Scatter(Chart):
    """One point per row of a frame, `y` against `x`; rows where either is NaN are left out.

    Attributes:
        label: column with the name of each point.
        href: column with the place that a point leads to, `#...`, or empty.
        diagonal: whether the line of equal values is drawn, as far as both axes reach.
    """

    template: ClassVar[str] = "scatter.html.j2"
    label: str | None = None
    href: str | None = None
    diagonal: bool = False

    def __post_init__(self) -> None:
        """Check the columns, and that there are not too many points."""
        super().__post_init__()
        if len(self.frame) > MAX_POINTS:
            raise InputError("frame", f"{len(self.frame)} rows", f"give at most {MAX_POINTS}")
        for name in ("label", "href"):
            column = getattr(self, name)
            if column is not None and column not in self.frame.columns:
                raise InputError(name, repr(column), "give a column of frame")

    def context(self) -> dict[str, Any]:
        """Coordinates of the points, by series, and of the axes."""
        labels = self.axis_labels()
        kept = self.frame[np.isfinite(self.frame[[self.x, self.y]].astype(float)).all(axis=1)]
        x_axis = _Axis.of(kept[self.x].tolist(), svg.LEFT, svg.WIDTH - svg.RIGHT)
        y_axis = _Axis.of(kept[self.y].tolist(), svg.HEIGHT - svg.BOTTOM, svg.TOP)
        names = [""] * len(kept) if self.by is None else kept[self.by].astype(str).tolist()
        points: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for name, row in zip(names, kept.to_dict("records"), strict=True):
            x, y = float(row[self.x]), float(row[self.y])
            tip = f"{labels['x_label']} {number(x)}, {labels['y_label']} {number(y)}"
            points[name].append(
                {
                    "x": x_axis.place(x),
                    "y": y_axis.place(y),
                    "tip": f"{row[self.label]}: {tip}" if self.label else tip,
                    "href": row[self.href] if self.href else "",
                }
            )
        series = [
            {"name": name, "colour": i % len(SERIES), "shape": i % 4, "points": some}
            for i, (name, some) in enumerate(points.items())
        ]
        diagonal = _diagonal(x_axis, y_axis) if self.diagonal else None
        chart = {
            "series": series,
            "x_ticks": x_axis.ticks(),
            "y_ticks": y_axis.ticks(),
            "diagonal": diagonal,
        }
        return {"chart": chart, "frame": svg.FRAME, **labels}


@dataclass(frozen=True)
class _Axis:
    """Marks at round values, and the coordinates of the first and the last of them."""

    marks: Sequence[float]
    start: float
    stop: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, stop: float) -> _Axis:
        """An axis that holds the values and zero."""
        numbers = [float(value) for value in values] or [0.0, 1.0]
        return cls(svg.ticks(min(*numbers, 0.0), max(*numbers, 0.0), 6), start, stop)

    def place(self, value: float) -> float:
        """The coordinate of a value."""
        low, high = self.marks[0], self.marks[-1]
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 1)

    def ticks(self) -> list[dict[str, Any]]:
        """Where the marks are, and their texts."""
        return [{"at": self.place(mark), "text": short(mark)} for mark in self.marks]


def _diagonal(x_axis: _Axis, y_axis: _Axis) -> dict[str, float] | None:
    """The ends of the line x = y within both axes; None if it lies outside."""
    low = max(x_axis.marks[0], y_axis.marks[0])
    high = min(x_axis.marks[-1], y_axis.marks[-1])
    if low >= high:
        return None
    ends = {"x1": low, "y1": low, "x2": high, "y2": high}
    return {
        name: (x_axis if name.startswith("x") else y_axis).place(value)
        for name, value in ends.items()
    }
