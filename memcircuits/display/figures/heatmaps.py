"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from memcircuits.core.errors import InputError
from memcircuits.display.figures.style import (
    BLUES,
    COMPONENTS,
    SIGNED,
    colorbar,
    escaped,
    require_columns,
    styled,
)
from memcircuits.display.numbers import cells, matrix
from memcircuits.display.palette import SERIES
from memcircuits.display.text import number, visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


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
        marks: Cells to frame, such as significant ones: pairs (row, col), or booleans [row, col].
        hover: Further text per cell.
    """
    import plotly.graph_objects as go

    array = matrix(values)
    diverging = bool((array < 0).any()) if diverging is None else diverging
    rows = [escaped(r) for r in row_names or range(array.shape[0])]
    cols = [escaped(c) for c in col_names or range(array.shape[1])]
    told = [
        [
            f"{escaped(row_label)} {r}, {escaped(col_label)} {c}<br>{escaped(name)}: "
            f"{number(float(array[i, j]), 4)} {escaped(units)}"
            + (f"<br>{escaped(hover[i][j])}" if hover else "")
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
            colorscale=SIGNED if diverging else BLUES,
            reversescale=reverse,
            zmin=-most if diverging else min(0.0, float(np.nanmin(array, initial=0.0))),
            zmax=most or 1.0,
            xgap=1,
            ygap=1,
            colorbar=colorbar(name, units),
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
        title_text=escaped(col_label),
        tickvals=list(range(len(cols))),
        ticktext=cols,
        showgrid=False,
    )
    figure.update_yaxes(
        title_text=escaped(row_label),
        tickvals=list(range(len(rows))),
        ticktext=rows,
        showgrid=False,
    )
    width = min(1100, max(420, 40 * array.shape[1] + 200))
    return styled(figure, title=title, width=width, height=max(300, 34 * array.shape[0] + 150))


def gradient_map(frame: pd.DataFrame, *, title: str = "", units: str = "") -> Figure:
    """Parameter gradients in the layout of the paper's figure 4, with the sum of each layer.

    Args:
        frame: Columns ``component, layer, head, value``; ``W_in`` and ``W_out`` have no head.
        title: Title.
        units: Unit of the values.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    require_columns(frame, "component", "layer", "head", "value")
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
    figure = styled(figure, title=title, width=1150, height=max(320, 30 * len(layers) + 170))
    bar = colorbar("gradient", units)
    return figure.update_layout(
        coloraxis={"colorscale": BLUES, "cmin": 0, "colorbar": bar}, margin_t=100
    )


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
        subplot_titles=[escaped(site) for site in arrays],
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
                hovertemplate=f"{escaped(row_label)} %{{y}}, {escaped(col_label)} %{{x}}: "
                "%{z:.4g}<extra></extra>",
            ),
            row=row,
            col=col,
        )
        figure.update_xaxes(showgrid=False, row=row, col=col)
        figure.update_yaxes(showgrid=False, dtick=max(1, n_rows // 8), row=row, col=col)
        if not wide or index == len(arrays) - 1:
            figure.update_xaxes(title_text=escaped(col_label), row=row, col=col)
        if wide or index == 0:
            figure.update_yaxes(title_text=escaped(row_label), row=row, col=col)
        if col_names:
            figure.update_xaxes(
                tickvals=list(range(n_cols)),
                ticktext=[escaped(visible(str(c), 16, tell=False)) for c in col_names],
                tickangle=-60,
                row=row,
                col=col,
            )
    panel = 60 + 26 * n_rows
    width = 1000 if wide else 200 + 260 * len(arrays)
    height = 130 + (panel + 40) * len(arrays) if wide else panel + 150
    figure = styled(figure, title=title, width=width, height=height)
    bar = colorbar(name, units)
    limit = most or 1.0
    return figure.update_layout(
        coloraxis={
            "colorscale": SIGNED,
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
    names = [escaped(visible(token, 16, tell=False)) for token in tokens]
    future = np.triu(np.ones((n, n), dtype=bool), 1)
    shown = np.where(future & (array == 0), np.nan, array)
    told = [[f"{names[q]} ({q}) looks at {names[k]} ({k})" for k in range(n)] for q in range(n)]
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            text=told,
            hovertemplate="%{text}: %{z:.3f}<extra></extra>",
            hoverongaps=False,
            colorscale=BLUES,
            zmin=0,
            zmax=1,
            colorbar=colorbar("attention", ""),
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
    return styled(figure, title=title, width=760, height=740)
