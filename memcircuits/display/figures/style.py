"""The look that all figures share: template, colours, and lines with intervals.

One template serves all figures: white ground, Okabe and Ito's colours with a dash and a marker of
their own for each series (colour is never the only difference), sequential blues for amounts and
blue-white-orange for values with a sign. The template is set on each figure, so that plotly's own
settings stay as the user has them. plotly is imported inside functions: it is slow to import.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from memcircuits.base.errors import InputError
from memcircuits.display.palette import SERIES
from memcircuits.display.text import clean

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

COMPONENTS = ("W_K", "W_Q", "W_V", "W_O", "W_in", "W_out", "W_gate")

BLUES = ["#ffffff", "#d6e6f4", "#9cc6e3", "#4f96cb", "#1c61a8", "#08306b"]
SIGNED = ["#08407e", "#2f7fbc", "#a5cde6", "#f7f7f7", "#fdc28c", "#e36c0a", "#8c3503"]
MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INK = "#1b1f24"
GREY = "#6b7280"

Z_95 = 1.96  # standard errors on either side of a 95 % interval


def escaped(value: object) -> str:
    """Text as plotly should show it: plotly interprets a few HTML tags, so they are escaped."""
    return html.escape(clean(str(value)), quote=False)


def require_columns(frame: pd.DataFrame, *columns: str) -> None:
    """Raise `InputError` unless a frame has these columns and at least one row."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        present = ", ".join(str(c) for c in frame.columns)
        raise InputError("frame", f"no column {', '.join(missing)}", f"it has {present}")
    if not len(frame):
        raise InputError("frame", "no rows", "there is nothing to draw")


def by_set(frame: pd.DataFrame) -> Iterable[tuple[Any, pd.DataFrame]]:
    """The series of a frame: its rows by `set`, in order of appearance; else one without name."""
    return frame.groupby("set", sort=False) if "set" in frame.columns else [("", frame)]


def interval_columns(frame: pd.DataFrame, y: str) -> tuple[pd.Series, pd.Series] | None:
    """The interval around a column, where the frame has one."""
    if {f"{y}_low", f"{y}_high"} <= set(frame.columns):
        return frame[f"{y}_low"], frame[f"{y}_high"]
    if f"{y}_se" in frame.columns:
        half_width = Z_95 * frame[f"{y}_se"]
        return frame[y] - half_width, frame[y] + half_width
    return None


def styled(figure: Figure, *, title: str, width: int, height: int) -> Figure:
    """Set the shared template, title and size on a figure; a long title is broken into lines."""
    lines = textwrap.wrap(title, max(20, (width - 80) // 8)) or [""]  # a letter is about 8 px
    figure.update_layout(
        template=_template(margin_top=80 if title else 40),
        title_text="<br>".join(escaped(line) for line in lines),
        width=width,
        height=height + 20 * (len(lines) - 1),
    )
    if len(lines) > 1:
        figure.update_layout(margin_t=80 + 20 * (len(lines) - 1))
    return figure


def _template(margin_top: int) -> Any:
    import plotly.graph_objects as go

    axis = {
        "showline": True,
        "linecolor": "#333",
        "ticks": "outside",
        "gridcolor": "#e3e6ea",
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8},
    }
    return go.layout.Template(
        layout={
            "font": {"family": "Arial, Helvetica, sans-serif", "size": 13, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(SERIES),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
            "margin": {"l": 60, "r": 20, "t": margin_top, "b": 55},
        }
    )


def colorbar(name: str, units: str) -> dict[str, Any]:
    """A colour bar with its name and units above it, in short lines that fit beside the map."""
    lines = [*textwrap.wrap(name, 16), *textwrap.wrap(units, 16)]
    text = "<br>".join(escaped(line) for line in lines)
    return {"title": {"text": text, "side": "top", "font": {"size": 12}}, "thickness": 18}


def band(
    x: pd.Series, low: pd.Series, high: pd.Series, *, colour: str, alpha: float, **options: Any
) -> Scatter:
    """The area between two curves, without an outline."""
    import plotly.graph_objects as go
    from plotly.colors import hex_to_rgb

    red, green, blue = hex_to_rgb(colour)
    return go.Scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{alpha})",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        **options,
    )


def add_lines(
    figure: Figure,
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    row: int,
    legend: bool,
    markers: bool,
    col: int = 1,
) -> None:
    """Add one line for each series (`by_set`) to a panel, with the band of its interval behind."""
    import plotly.graph_objects as go

    for index, (name, series) in enumerate(by_set(frame)):
        series = series.sort_values(x)
        colour = SERIES[index % len(SERIES)]
        bounds = interval_columns(series, y)
        if bounds is not None:
            known = bounds[0].notna() & bounds[1].notna()
            low, high, at = (column[known] for column in (*bounds, series[x]))
            options = {"showlegend": False, "legendgroup": str(index)}
            area = band(at, low, high, colour=colour, alpha=0.18, **options)
            figure.add_trace(area, row=row, col=col)
        line = go.Scatter(
            x=series[x],
            y=series[y],
            name=escaped(name),
            mode="lines+markers" if markers else "lines",
            line={"color": colour, "width": 2.2, "dash": DASHES[index % len(DASHES)]},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            legendgroup=str(index),
            showlegend=legend and bool(name),
        )
        figure.add_trace(line, row=row, col=col)
