"""Plotly figures of the measurements: pure functions of arrays and frames that return a figure.

Nothing here computes a measurement, shows a figure or changes plotly's settings: the caller does
``figure.show()``, ``figure.write_html("f.html", include_plotlyjs=True)`` (one file that needs no
network) or, with kaleido and Chrome or Chromium installed, ``figure.write_image("f.pdf")``. One
template serves all: white ground, Okabe and Ito's
colours with a dash and a marker of their own for each series (colour is never the only
difference), sequential blues for amounts and blue-white-orange for values with a sign.

Frames are tidy: one row per point. An interval around column ``y`` is given by the columns
``y_low`` and ``y_high``, or by ``y_se`` (1.96 standard errors either way), where they exist.
``set`` names the series ("memorized", "control"). A missing column raises an ``InputError`` that
lists what is there.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from memcircuits.checks import InputError
from memcircuits.pages.numbers import cells, matrix
from memcircuits.pages.palette import SERIES
from memcircuits.pages.text import clean, number, visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
else:
    Figure = Any

COMPONENTS = ("W_K", "W_Q", "W_V", "W_O", "W_in", "W_out", "W_gate")

_BLUES = ["#ffffff", "#d6e6f4", "#9cc6e3", "#4f96cb", "#1c61a8", "#08306b"]
_SIGNED = ["#08407e", "#2f7fbc", "#a5cde6", "#f7f7f7", "#fdc28c", "#e36c0a", "#8c3503"]
_MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_GREY = "#6b7280"


def _text(value: object) -> str:
    """Text as plotly should show it: plotly reads a few HTML tags, so ours are escaped."""
    return html.escape(clean(str(value)), quote=False)


def _need(frame: pd.DataFrame, *columns: str) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        there = ", ".join(str(c) for c in frame.columns)
        raise InputError("frame", f"no column {', '.join(missing)}", f"it has {there}")
    if not len(frame):
        raise InputError("frame", "no rows", "there is nothing to draw")


def _interval(frame: pd.DataFrame, y: str) -> tuple[pd.Series, pd.Series] | None:
    """The interval around a column, where the frame has one."""
    if {f"{y}_low", f"{y}_high"} <= set(frame.columns):
        return frame[f"{y}_low"], frame[f"{y}_high"]
    if f"{y}_se" in frame.columns:
        return frame[y] - 1.96 * frame[f"{y}_se"], frame[y] + 1.96 * frame[f"{y}_se"]
    return None


def _layout(figure: Figure, *, title: str, width: int, height: int) -> Figure:
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
        title_text="<br>".join(_text(line) for line in lines),
        width=width,
        height=height + 20 * (len(lines) - 1),
    )
    if len(lines) > 1:
        figure.update_layout(margin_t=80 + 20 * (len(lines) - 1))
    return figure


def _colorbar(name: str, units: str) -> dict[str, Any]:
    """A colour bar with its name and units above it, in short lines that fit beside the map."""
    lines = [*textwrap.wrap(name, 16), *textwrap.wrap(units, 16)]
    text = "<br>".join(_text(line) for line in lines)
    return {"title": {"text": text, "side": "top", "font": {"size": 12}}, "thickness": 18}


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _add_lines(
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
        interval = _interval(group, y)
        if interval is not None:
            known = interval[0].notna() & interval[1].notna()
            low, high, at = (column[known] for column in (*interval, group[x]))
            figure.add_trace(
                go.Scatter(
                    x=[*at, *at[::-1]],
                    y=[*high, *low[::-1]],
                    fill="toself",
                    fillcolor=_rgba(colour, 0.18),
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
                name=_text(name),
                mode="lines+markers" if markers else "lines",
                line={"color": colour, "width": 2.2, "dash": _DASHES[index % len(_DASHES)]},
                marker={"symbol": _MARKERS[index % len(_MARKERS)], "size": 7},
                legendgroup=str(index),
                showlegend=legend and bool(name),
            ),
            row=row,
            col=col,
        )


def curves(
    frame: pd.DataFrame,
    x: str,
    panels: Mapping[str, str],
    *,
    title: str = "",
    x_label: str = "",
    markers: bool = True,
) -> Figure:
    """Lines against ``x``, in panels over one another that share that axis.

    Args:
        frame: Column ``x``, the columns of ``panels`` and if wanted ``set`` and intervals.
        x: Column along the bottom.
        panels: Column to what it is, with units; those that the frame lacks are left out, but for
            the first.
        title: Title.
        x_label: What ``x`` is.
        markers: Whether each point gets a mark.
    """
    from plotly.subplots import make_subplots

    _need(frame, x, next(iter(panels)))
    shown = {column: label for column, label in panels.items() if column in frame.columns}
    figure = make_subplots(rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for row, (column, label) in enumerate(shown.items(), start=1):
        _add_lines(figure, frame, x, column, row=row, legend=row == 1, markers=markers)
        figure.update_yaxes(title_text=label, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text=x_label, row=len(shown), col=1)
    return _layout(figure, title=title, width=720, height=130 + 230 * len(shown))


def heatmap(
    values: Any,
    *,
    title: str = "",
    name: str = "value",
    units: str = "",
    diverging: bool | None = None,
    reverse: bool = False,
    row_label: str = "layer",
    col_label: str = "head",
    row_names: Sequence[str] = (),
    col_names: Sequence[str] = (),
    marks: Any = (),
    hover: Sequence[Sequence[str]] = (),
) -> Figure:
    """A value per layer and head, layer 0 at the bottom as in the paper.

    Args:
        values: Array [row, col]; NaN stays blank (not measured).
        title: Title.
        name: What the values are.
        units: Their unit.
        diverging: Colours around zero (default: if any value is negative).
        reverse: Orange below zero instead of above.
        row_label: Name of the rows.
        col_label: Name of the columns.
        row_names: One per row (default: its number).
        col_names: One per column (default: its number).
        marks: Cells framed because they stand out: pairs (row, col), or booleans [row, col].
        hover: Further text per cell.
    """
    import plotly.graph_objects as go

    array = matrix(values)
    diverging = bool((array < 0).any()) if diverging is None else diverging
    rows = [_text(r) for r in row_names or range(array.shape[0])]
    cols = [_text(c) for c in col_names or range(array.shape[1])]
    told = [
        [
            f"{_text(row_label)} {r}, {_text(col_label)} {c}<br>{_text(name)}: "
            f"{number(float(array[i, j]), 4)} {_text(units)}"
            + (f"<br>{_text(hover[i][j])}" if hover else "")
            for j, c in enumerate(cols)
        ]
        for i, r in enumerate(rows)
    ]
    most = float(np.nanmax(np.abs(array))) if np.isfinite(array).any() else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=array,
            text=told,
            hovertemplate="%{text}<extra></extra>",
            colorscale=_SIGNED if diverging else _BLUES,
            reversescale=reverse,
            zmin=-most if diverging else min(0.0, float(np.nanmin(array, initial=0.0))),
            zmax=most or 1.0,
            xgap=1,
            ygap=1,
            colorbar=_colorbar(name, units),
        )
    )
    for i, j in cells(marks, array.shape):
        figure.add_shape(
            type="rect",
            x0=j - 0.5,
            x1=j + 0.5,
            y0=i - 0.5,
            y1=i + 0.5,
            line={"color": "#d5006c", "width": 2.5},
        )
    figure.update_xaxes(
        title_text=_text(col_label), tickvals=list(range(len(cols))), ticktext=cols, showgrid=False
    )
    figure.update_yaxes(
        title_text=_text(row_label), tickvals=list(range(len(rows))), ticktext=rows, showgrid=False
    )
    width = min(1100, max(420, 40 * array.shape[1] + 200))
    return _layout(figure, title=title, width=width, height=max(300, 34 * array.shape[0] + 150))


def gradient_map(frame: pd.DataFrame, *, title: str = "", units: str = "") -> Figure:
    """Parameter gradients in the layout of the paper's figure 4, with the sum of each layer.

    Args:
        frame: Columns ``component, layer, head, value``; ``W_in`` and ``W_out`` have no head.
        title: Title.
        units: Unit of the values.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    _need(frame, "component", "layer", "head", "value")
    present = [c for c in COMPONENTS if (frame["component"] == c).any()]
    if not present:
        given = ", ".join(sorted(set(frame["component"].astype(str))))
        raise InputError("component", given, f"give some of {', '.join(COMPONENTS)}")
    layers = sorted(frame["layer"].unique())
    heads = frame["head"].notna() & (frame["head"].astype(str) != "")
    n_heads = int(frame.loc[heads, "head"].astype(int).max()) + 1 if heads.any() else 1
    per_head = [bool(heads[frame["component"] == c].any()) for c in present]
    figure = make_subplots(
        rows=1,
        cols=len(present) + 1,
        shared_yaxes=True,
        horizontal_spacing=0.012,
        column_widths=[n_heads if h else max(1.0, 0.3 * n_heads) for h in per_head] + [n_heads],
        subplot_titles=[*present, "sum of layer"],
    )
    for col, (component, has_heads) in enumerate(zip(present, per_head, strict=True), start=1):
        part = frame[frame["component"] == component]
        columns = part["head"].astype(int) if has_heads else 0
        matrix = part.assign(at=columns).pivot_table(index="layer", columns="at", values="value")
        matrix = matrix.reindex(layers)
        figure.add_trace(
            go.Heatmap(
                z=matrix.to_numpy(),
                x=[int(c) for c in matrix.columns],
                y=[str(layer) for layer in layers],
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate=f"{component}, layer %{{y}}"
                + (", head %{x}" if has_heads else "")
                + ": %{z:.4g}<extra></extra>",
            ),
            row=1,
            col=col,
        )
        figure.update_xaxes(
            title_text="head" if has_heads else "",
            showticklabels=has_heads,
            dtick=max(1, n_heads // 4),
            showgrid=False,
            row=1,
            col=col,
        )
    sums = frame.groupby("layer")["value"].sum().reindex(layers)
    share = sums / (sums.sum() or 1.0)
    figure.add_trace(
        go.Bar(
            x=sums,
            y=[str(layer) for layer in layers],
            orientation="h",
            marker_color=SERIES[0],
            showlegend=False,
            text=[f"{100 * s:.0f} %" for s in share],
            textposition="auto",
            hovertemplate="layer %{y}: %{x:.4g} (%{text} of all)<extra></extra>",
        ),
        row=1,
        col=len(present) + 1,
    )
    figure.update_yaxes(showgrid=False, type="category")
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure = _layout(figure, title=title, width=1150, height=max(320, 30 * len(layers) + 170))
    bar = _colorbar("gradient", units)
    return figure.update_layout(
        coloraxis={"colorscale": _BLUES, "cmin": 0, "colorbar": bar}, margin_t=100
    )


def perturbation_curves(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """What replacing one prefix token does to the continuation (the paper's figure 3).

    Args:
        frame: Columns ``position, em`` and if wanted ``nll, set`` and intervals.
        title: Title.
    """
    return curves(
        frame,
        "position",
        {"em": "exact match (tokens)", "nll": "NLL (nats/token)"},
        title=title,
        x_label="position of the replaced prefix token",
        markers=False,
    )


def duplication_curve(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Exact match and NLL against how often a paragraph was repeated (the paper's figure 2).

    Args:
        frame: Columns ``repetitions, em`` and if wanted ``nll, set`` and intervals.
        title: Title.
    """
    _need(frame, "repetitions")
    if (frame["repetitions"] <= 0).any():
        raise InputError("repetitions", "0 or less", "leave it out: the axis is logarithmic")
    figure = curves(
        frame,
        "repetitions",
        {"em": "exact match (tokens)", "nll": "NLL (nats/token)"},
        title=title,
        x_label="repetitions in training",
        markers=True,
    )
    counts = sorted(set(frame["repetitions"].tolist()))
    figure.update_xaxes(type="log")
    if len(counts) <= 14:
        figure.update_xaxes(tickvals=counts, ticktext=[str(c) for c in counts])
    return figure


def em_against_nll(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Each paragraph by how much of it is recited and how well it is predicted.

    Args:
        frame: Columns ``em, nll`` and if wanted ``memorized`` and ``id``.
        title: Title.
    """
    import plotly.graph_objects as go

    _need(frame, "em", "nll")
    known = "memorized" in frame.columns
    chosen = frame["memorized"].astype(bool) if known else pd.Series(False, index=frame.index)
    figure = go.Figure()
    for index, (name, rows) in enumerate((("memorized", chosen), ("others", ~chosen))):
        part = frame[rows]
        if len(part):
            figure.add_trace(
                go.Scattergl(
                    x=part["nll"],
                    y=part["em"],
                    mode="markers",
                    name=name,
                    showlegend=known,
                    text=[_text(i) for i in part["id"]] if "id" in part.columns else None,
                    marker={"symbol": _MARKERS[index], "color": SERIES[index], "opacity": 0.6},
                    hovertemplate="%{text}<br>EM %{y}, NLL %{x:.3f}<extra>%{fullData.name}</extra>",
                )
            )
    figure.update_xaxes(title_text="NLL of the continuation (nats/token)", rangemode="tozero")
    top = max(1.0, float(frame["em"].max()))
    margin = 0.03 * top  # or the many points at 0 would be cut in half
    figure.update_yaxes(title_text="exact match (tokens)", range=[-margin, top + 2 * margin])
    return _layout(figure, title=title, width=720, height=420)


def attention_by_rank(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Attention to prefix tokens against their frequency rank (the paper's figure 7).

    Args:
        frame: Columns ``rank, attention`` (mean attention per token at that rank), if wanted
            ``set`` (such as the head), ``attention_low, attention_high``, and the band in which
            attention lies when ranks are shuffled within paragraphs: ``null_low, null_high``.
        title: Title.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    _need(frame, "rank", "attention")
    figure = make_subplots(rows=1, cols=1)
    if {"null_low", "null_high"} <= set(frame.columns):
        null = frame.groupby("rank", as_index=False)[["null_low", "null_high"]].agg(
            {"null_low": "min", "null_high": "max"}
        )
        figure.add_trace(
            go.Scatter(
                x=[*null["rank"], *null["rank"][::-1]],
                y=[*null["null_high"], *null["null_low"][::-1]],
                fill="toself",
                fillcolor=_rgba(_GREY, 0.25),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                name="ranks shuffled within paragraphs",
            )
        )
    _add_lines(figure, frame, "rank", "attention", row=1, legend=True, markers=True)
    figure.update_xaxes(title_text="frequency rank within the prefix (1 = rarest)")
    figure.update_yaxes(title_text="attention per token", rangemode="tozero")
    return _layout(figure, title=title, width=720, height=400)


def arms(frame: pd.DataFrame, *, title: str = "", y_label: str = "exact match (tokens)") -> Figure:
    """Each arm of an unlearning or editing run, memorized beside control (the paper's figure 5).

    Args:
        frame: Columns ``arm, value`` and if wanted ``set, value_low, value_high``.
        title: Title.
        y_label: What the values are.
    """
    import plotly.graph_objects as go

    _need(frame, "arm", "value")
    figure = go.Figure()
    groups = frame.groupby("set", sort=False) if "set" in frame.columns else [("", frame)]
    for index, (name, group) in enumerate(groups):
        figure.add_trace(
            go.Bar(
                x=[_text(a) for a in group["arm"]],
                y=group["value"],
                name=_text(name),
                showlegend=bool(name),
                marker={
                    "color": SERIES[index % len(SERIES)],
                    "pattern": {"shape": ("", "/", "x", ".")[index % 4], "solidity": 0.35},
                },
                error_y=_whiskers(group, "value"),
                hovertemplate="%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_yaxes(title_text=_text(y_label), rangemode="tozero")
    figure.update_xaxes(showgrid=False)
    return _layout(figure, title=title, width=760, height=420).update_layout(barmode="group")


def _whiskers(frame: pd.DataFrame, column: str) -> dict[str, Any] | None:
    interval = _interval(frame, column)
    if interval is None:
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": (interval[1] - frame[column]).tolist(),
        "arrayminus": (frame[column] - interval[0]).tolist(),
        "color": "#1b1f24",
        "thickness": 1.3,
    }


def leaderboard(
    frame: pd.DataFrame, *, title: str = "", x_label: str = "recall", chance: float | None = None
) -> Figure:
    """Localization methods, best on top.

    Args:
        frame: Columns ``method, score`` and if wanted ``score_low, score_high``.
        title: Title.
        x_label: What the score is.
        chance: What guessing scores: a dashed line.
    """
    import plotly.graph_objects as go

    _need(frame, "method", "score")
    ranked = frame.sort_values("score")
    figure = go.Figure(
        go.Bar(
            x=ranked["score"],
            y=[_text(m) for m in ranked["method"]],
            orientation="h",
            marker_color=SERIES[0],
            error_x=_whiskers(ranked, "score"),
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    if chance is not None:
        figure.add_vline(
            x=chance,
            line={"dash": "dash", "color": _GREY},
            annotation_text=f"chance {chance:.3g}",
            annotation_position="top",
        )
    figure.update_xaxes(title_text=_text(x_label), rangemode="tozero")
    figure.update_yaxes(showgrid=False)
    return _layout(figure, title=title, width=760, height=max(280, 34 * len(ranked) + 150))


def noise_curves(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Exact match and NLL against the size of noise on weights.

    Args:
        frame: Columns ``size, em`` and if wanted ``nll, set`` and intervals.
        title: Title.
    """
    _need(frame, "size", "em")
    sizes = sorted({float(size) for size in frame["size"]})  # evenly spaced: they include 0
    figure = curves(
        frame.assign(place=[sizes.index(float(size)) for size in frame["size"]]),
        "place",
        {"em": "exact match (tokens)", "nll": "NLL (nats/token)"},
        title=title,
        x_label="size of the noise, relative to each matrix",
    )
    names = ["none" if size == 0 else f"{size:.3g}" for size in sizes]
    return figure.update_xaxes(tickvals=list(range(len(sizes))), ticktext=names)


def minimal_sets(stopping: pd.DataFrame, starting: pd.DataFrame, *, title: str = "") -> Figure:
    """How few prefix tokens stop a recitation (left), and how few start it (right).

    Args:
        stopping: Columns ``replaced, em`` and if wanted an interval.
        starting: Columns ``given, em`` and if wanted an interval.
        title: Title.
    """
    from plotly.subplots import make_subplots

    _need(stopping, "replaced", "em")
    _need(starting, "given", "em")
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    for col, (frame, x, label) in enumerate(
        (
            (stopping, "replaced", "prefix tokens replaced, worst first"),
            (starting, "given", "last prefix tokens given"),
        ),
        start=1,
    ):
        _add_lines(figure, frame, x, "em", row=1, col=col, legend=False, markers=len(frame) <= 20)
        figure.update_xaxes(title_text=label, row=1, col=col)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="exact match (tokens)", row=1, col=1)
    return _layout(figure, title=title, width=860, height=380)


def patching_map(
    panels: Mapping[str, Any],
    *,
    title: str = "",
    name: str = "change of NLL",
    units: str = "nats",
    reverse: bool = False,
    row_label: str = "layer",
    col_label: str = "head",
    col_names: Sequence[str] = (),
) -> Figure:
    """Effects of activation patching, one panel per site, all on one scale around zero.

    Args:
        panels: Site (``"z"``, ``"q"``, ...) to array [layer, head] or [layer, position].
        title: Title.
        name: What the values are.
        units: Their unit.
        reverse: Orange below zero instead of above.
        row_label: Name of the rows.
        col_label: Name of the columns.
        col_names: One per column, such as the prefix's tokens (default: its number).
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not panels:
        raise InputError("panels", "empty", "give at least one site with its array")
    arrays = {site: matrix(values, f"panels[{site!r}]") for site, values in panels.items()}
    n_rows, n_cols = next(iter(arrays.values())).shape
    most = max((float(np.nanmax(np.abs(a))) for a in arrays.values()), default=1.0)
    wide = n_cols > 20
    figure = make_subplots(
        rows=len(arrays) if wide else 1,
        cols=1 if wide else len(arrays),
        subplot_titles=[_text(site) for site in arrays],
        shared_yaxes=not wide,
        shared_xaxes=wide,
        horizontal_spacing=0.03,
        vertical_spacing=0.3 / len(arrays),
    )
    for index, array in enumerate(arrays.values()):
        row, col = (index + 1, 1) if wide else (1, index + 1)
        figure.add_trace(
            go.Heatmap(
                z=array,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate=f"{_text(row_label)} %{{y}}, {_text(col_label)} %{{x}}: "
                "%{z:.4g}<extra></extra>",
            ),
            row=row,
            col=col,
        )
        figure.update_xaxes(showgrid=False, row=row, col=col)
        figure.update_yaxes(showgrid=False, dtick=max(1, n_rows // 8), row=row, col=col)
        if not wide or index == len(arrays) - 1:
            figure.update_xaxes(title_text=_text(col_label), row=row, col=col)
        if wide or index == 0:
            figure.update_yaxes(title_text=_text(row_label), row=row, col=col)
        if col_names:
            figure.update_xaxes(
                tickvals=list(range(n_cols)),
                ticktext=[_text(visible(str(c), 16, tell=False)) for c in col_names],
                tickangle=-60,
                row=row,
                col=col,
            )
    panel = 60 + 26 * n_rows
    width = 1000 if wide else 200 + 260 * len(arrays)
    height = 130 + (panel + 40) * len(arrays) if wide else panel + 150
    figure = _layout(figure, title=title, width=width, height=height)
    bar = _colorbar(name, units)
    limit = most or 1.0
    return figure.update_layout(
        coloraxis={
            "colorscale": _SIGNED,
            "reversescale": reverse,
            "cmin": -limit,
            "cmax": limit,
            "colorbar": bar,
        },
        margin_t=100,
    )


def attention_pattern(
    values: Any, tokens: Sequence[str], *, n_prefix: int = 0, title: str = ""
) -> Figure:
    """One head's attention pattern, queries downwards; a line ends the prefix.

    Args:
        values: Array [query, key] of probabilities.
        tokens: Text of each token.
        n_prefix: Where the continuation begins (0: no line).
        title: Title.
    """
    import plotly.graph_objects as go

    array = matrix(values)
    n = len(tokens)
    if array.shape != (n, n):
        raise InputError("values", f"shape {array.shape}", f"give [{n}, {n}], one row per token")
    names = [_text(visible(token, 16, tell=False)) for token in tokens]
    future = np.triu(np.ones((n, n), dtype=bool), 1)
    shown = np.where(future & (array == 0), np.nan, array)
    told = [[f"{names[q]} ({q}) looks at {names[k]} ({k})" for k in range(n)] for q in range(n)]
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            text=told,
            hovertemplate="%{text}: %{z:.3f}<extra></extra>",
            hoverongaps=False,
            colorscale=_BLUES,
            zmin=0,
            zmax=1,
            colorbar=_colorbar("attention", ""),
        )
    )
    if 0 < n_prefix < n:
        edge = {"line": {"color": "#d55e00", "dash": "dot", "width": 1.5}}
        figure.add_hline(y=n_prefix - 0.5, **edge)
        figure.add_vline(x=n_prefix - 0.5, **edge)
    every = list(range(0, n, max(1, n // 25)))
    marks = {"tickvals": every, "ticktext": [names[i] for i in every], "showgrid": False}
    figure.update_xaxes(title_text="token looked at", tickangle=-60, **marks)
    figure.update_yaxes(title_text="token that looks", autorange="reversed", **marks)
    return _layout(figure, title=title, width=760, height=740)
