"""TODO."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd

from memcircuits.core.errors import InputError
from memcircuits.display.palette import SERIES
from memcircuits.display.text import clean

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


COMPONENTS = ("W_K", "W_Q", "W_V", "W_O", "W_in", "W_out", "W_gate")


BLUES = ["#ffffff", "#d6e6f4", "#9cc6e3", "#4f96cb", "#1c61a8", "#08306b"]


SIGNED = ["#08407e", "#2f7fbc", "#a5cde6", "#f7f7f7", "#fdc28c", "#e36c0a", "#8c3503"]


MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x")


DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


GREY = "#6b7280"


def escaped(value: object) -> str:
    """Text as plotly should show it: plotly reads a few HTML tags, so ours are escaped."""
    return html.escape(clean(str(value)), quote=False)


def require_columns(frame: pd.DataFrame, *columns: str) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        there = ", ".join(str(c) for c in frame.columns)
        raise InputError("frame", f"no column {', '.join(missing)}", f"it has {there}")
    if not len(frame):
        raise InputError("frame", "no rows", "there is nothing to draw")


def interval_columns(frame: pd.DataFrame, y: str) -> tuple[pd.Series, pd.Series] | None:
    """The interval around a column, where the frame has one."""
    if {f"{y}_low", f"{y}_high"} <= set(frame.columns):
        return frame[f"{y}_low"], frame[f"{y}_high"]
    if f"{y}_se" in frame.columns:
        return frame[y] - 1.96 * frame[f"{y}_se"], frame[y] + 1.96 * frame[f"{y}_se"]
    return None


def styled(figure: Figure, *, title: str, width: int, height: int) -> Figure:
    """The house style, set on this figure only."""
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
    template = go.layout.Template(
        layout={
            "font": {"family": "Arial, Helvetica, sans-serif", "size": 13, "color": "#1b1f24"},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(SERIES),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
            "margin": {"l": 60, "r": 20, "t": 80 if title else 40, "b": 55},
        }
    )
    lines = textwrap.wrap(title, max(20, (width - 80) // 8)) or [""]  # a letter is about 8 px
    figure.update_layout(
        template=template,
        title_text="<br>".join(escaped(line) for line in lines),
        width=width,
        height=height + 20 * (len(lines) - 1),
    )
    if len(lines) > 1:
        figure.update_layout(margin_t=80 + 20 * (len(lines) - 1))
    return figure


def colorbar(name: str, units: str) -> dict[str, Any]:
    """A colour bar with its name and units above it, in short lines that fit beside the map."""
    lines = [*textwrap.wrap(name, 16), *textwrap.wrap(units, 16)]
    text = "<br>".join(escaped(line) for line in lines)
    return {"title": {"text": text, "side": "top", "font": {"size": 12}}, "thickness": 18}


def rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


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
    """One line per value of ``set`` (all rows when there is no such column), bands behind."""
    import plotly.graph_objects as go

    groups = frame.groupby("set", sort=False) if "set" in frame.columns else [("", frame)]
    for index, (name, group) in enumerate(groups):
        group = group.sort_values(x)
        colour = SERIES[index % len(SERIES)]
        interval = interval_columns(group, y)
        if interval is not None:
            known = interval[0].notna() & interval[1].notna()
            low, high, at = (column[known] for column in (*interval, group[x]))
            figure.add_trace(
                go.Scatter(
                    x=[*at, *at[::-1]],
                    y=[*high, *low[::-1]],
                    fill="toself",
                    fillcolor=rgba(colour, 0.18),
                    line={"width": 0},
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=str(index),
                ),
                row=row,
                col=col,
            )
        figure.add_trace(
            go.Scatter(
                x=group[x],
                y=group[y],
                name=escaped(name),
                mode="lines+markers" if markers else "lines",
                line={"color": colour, "width": 2.2, "dash": DASHES[index % len(DASHES)]},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                legendgroup=str(index),
                showlegend=legend and bool(name),
            ),
            row=row,
            col=col,
        )
