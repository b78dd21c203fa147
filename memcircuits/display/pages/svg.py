"""Where things go in a small chart: scales, ticks and positions, but no markup.

Charts in a page are inline SVG, which needs no script, prints sharply and weighs a few kB where
plotly.js weighs 4.8 MB. This module turns numbers into coordinates (plain dictionaries); the
templates turn those into SVG, so that labels pass through the same escaping as all other text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from memcircuits.display.palette import SERIES
from memcircuits.display.text import number, short

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 42


FRAME = {
    "width": WIDTH,
    "height": HEIGHT,
    "left": LEFT,
    "right": WIDTH - RIGHT,
    "bottom": HEIGHT - BOTTOM,
}


Place: TypeAlias = Callable[[float], float]
"""From a value to its coordinate."""

DASHES = ("", "7 4", "2 4", "9 3 2 3", "12 4", "4 2")


@dataclass(frozen=True)
class Series:
    """One named line or set of bars: `y` (and its interval) against `x`; NaN means a gap."""

    name: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high] in about `count` steps of 1, 2 or 5 times 10^k."""
    if not high > low:
        high = low + (abs(low) if abs(low) > 1e-300 else 1.0)  # smaller ones have no logarithm
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """The values themselves while they are few (1, 2, 4, ... repetitions), else powers of ten."""
    unique = sorted(set(values))
    if len(unique) <= 12:
        return unique
    low, high = math.floor(math.log10(unique[0])), math.ceil(math.log10(unique[-1]))
    return [10.0**power for power in range(low, high + 1)]


def clip(label: str) -> str:
    """A label that fits beside an axis."""
    return label if len(label) <= 18 else label[:17] + "…"


def _finite(series: Sequence[Series]) -> list[float]:
    numbers: list[float] = []
    for one in series:
        for values in (one.y, one.low, one.high):
            if values is not None:
                numbers += [float(v) for v in values if math.isfinite(v)]
    return numbers


def _y_axis(series: Sequence[Series], from_zero: bool) -> tuple[list[dict[str, Any]], Place]:
    numbers = _finite(series) or [0.0, 1.0]
    low, high = min(numbers), max(numbers)
    # Start at zero unless that would squash the data into the top of the chart.
    if from_zero or 0 < low < 0.5 * high:
        low = min(0.0, low)
    if from_zero:
        high = max(0.0, high)
    marks = ticks(low, high)
    bottom, top = marks[0], marks[-1]

    def place(value: float) -> float:
        share = (value - bottom) / (top - bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    return [{"at": place(m), "text": short(m)} for m in marks], place


def _tip(series: Series, index: int, x: Any, x_label: str, units: str) -> str:
    at = number(float(x)) if isinstance(x, (int, float, np.number)) else str(x)
    text = f"{x_label} {at}: {number(float(series.y[index]))}"
    if series.low is not None and series.high is not None:
        text += f" [{number(float(series.low[index]))}, {number(float(series.high[index]))}]"
    if units:
        text += f" {units}"
    return f"{series.name}, {text}" if series.name else text


def lines(series: Sequence[Series], *, log_x: bool, x_label: str, units: str) -> dict[str, Any]:
    """Coordinates of a line chart with bands for intervals."""
    xs = [float(x) for one in series for x in one.x]
    x_ticks = log_ticks(xs) if log_x else ticks(min(xs), max(xs), 8)
    scale = math.log if log_x else float
    left, right = (min(xs), max(xs)) if not log_x else (x_ticks[0], x_ticks[-1])
    span = (scale(right) - scale(left)) or 1.0
    y_ticks, place_y = _y_axis(series, from_zero=False)

    def place_x(value: float) -> float:
        share = (scale(value) - scale(left)) / span
        return round(LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16), 1)

    drawn = []
    for index, one in enumerate(series):
        tips = [_tip(one, i, x, x_label, units) for i, x in enumerate(one.x)]
        runs = _runs(one, tips, place_x, place_y)
        points = [point for run in runs for point in run]
        drawn.append(
            {
                "name": one.name,
                "colour": index % len(SERIES),
                "dash": DASHES[index % len(DASHES)],
                "shape": index % 4,
                "runs": [_path((point["x"], point["y"]) for point in run) for run in runs],
                "band": _band(one, place_x, place_y),
                "points": points,
                "dots": len(points) <= 40,
            }
        )
    return {
        "series": drawn,
        "x_ticks": [{"at": place_x(t), "text": short(t)} for t in x_ticks if left <= t <= right],
        "y_ticks": y_ticks,
        "zero": None,
    }


def _runs(
    series: Series, tips: Sequence[str], place_x: Place, place_y: Place
) -> list[list[dict[str, Any]]]:
    """The points of a line, split where a value is missing."""
    runs: list[list[dict[str, Any]]] = [[]]
    for x, y, tip in zip(series.x, series.y, tips, strict=True):
        if math.isfinite(y):
            runs[-1].append({"x": place_x(float(x)), "y": place_y(float(y)), "tip": tip})
        else:
            runs.append([])
    return [run for run in runs if run]


def _band(series: Series, place_x: Place, place_y: Place) -> str:
    """The outline of the interval: along its upper bounds, and back along the lower ones."""
    if series.low is None or series.high is None:
        return ""
    bounds = [
        (place_x(float(x)), place_y(float(low)), place_y(float(high)))
        for x, low, high in zip(series.x, series.low, series.high, strict=True)
        if math.isfinite(low) and math.isfinite(high)
    ]
    upper = [(x, high) for x, _, high in bounds]
    lower = [(x, low) for x, low, _ in reversed(bounds)]
    return _path(upper + lower)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def bars(series: Sequence[Series], *, x_label: str, units: str) -> dict[str, Any]:
    """Coordinates of grouped bars from zero, with whiskers for intervals."""
    categories = list(dict.fromkeys(str(x) for one in series for x in one.x))
    y_ticks, place_y = _y_axis(series, from_zero=True)
    slot = (WIDTH - LEFT - RIGHT) / len(categories)
    width = min(44.0, slot * 0.8 / len(series))
    drawn = []
    for index, one in enumerate(series):
        boxes = []
        for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
            if math.isfinite(y):
                middle = LEFT + slot * (categories.index(str(x)) + 0.5)
                left = middle + (index - len(series) / 2) * width
                tip = _tip(one, i, x, x_label, units)
                boxes.append({**_box(left, width, y, place_y), "tip": tip})
                boxes[-1] |= _whisker(one, i, place_y)
        drawn.append({"name": one.name, "colour": index % len(SERIES), "boxes": boxes})
    names = [clip(category) for category in categories]
    every = label_step(names, slot)
    return {
        "series": drawn,
        "x_ticks": [
            {"at": round(LEFT + slot * (i + 0.5), 1), "text": name}
            for i, name in enumerate(names)
            if i % every == 0
        ],
        "y_ticks": y_ticks,
        "zero": place_y(0.0),
    }


def _box(left: float, width: float, y: float, place_y: Place) -> dict[str, Any]:
    """A bar between zero and a value."""
    zero, end = place_y(0.0), place_y(float(y))
    return {
        "x": round(left + 1, 1),
        "y": min(end, zero),
        "width": round(width - 2, 1),
        "height": round(max(abs(end - zero), 0.5), 1),
        "middle": round(left + width / 2, 1),
    }


def _whisker(series: Series, index: int, place_y: Place) -> dict[str, float]:
    """The ends of the interval around a bar; empty where there is none."""
    if series.low is None or series.high is None:
        return {}
    low, high = float(series.low[index]), float(series.high[index])
    if not (math.isfinite(low) and math.isfinite(high)):
        return {}
    return {"low": place_y(low), "high": place_y(high)}


def label_step(names: Sequence[str], spacing: float) -> int:
    """Show every n-th label: a character is about 8 px wide, and labels must not overlap."""
    return max(1, math.ceil(max(len(name) for name in names) * 8 / spacing))
