"""Several matrices side by side on one colour scale: gradients by component, patches by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from memcircuits.base.errors import InputError
from memcircuits.display.figures.style import (
    BLUES,
    COMPONENTS,
    SIGNED,
    colorbar,
    escaped,
    require_columns,
    styled,
)
from memcircuits.display.numbers import matrix
from memcircuits.display.palette import SERIES
from memcircuits.display.text import visible

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Figure, Heatmap

MANY_COLUMNS = 20  # beyond these, panels are stacked instead of set side by side


def gradient_map(frame: pd.DataFrame, *, title: str = "", units: str = "") -> Figure:
    """Parameter gradients in the layout of the paper's figure 4, with the sum of each layer.

    Args:
        frame: columns `component, layer, head, value`; `W_in` and `W_out` have no head.
        title: title.
        units: unit of the values.
    """
    from plotly.subplots import make_subplots

    require_columns(frame, "component", "layer", "head", "value")
    components = [c for c in COMPONENTS if (frame["component"] == c).any()]
    if not components:
        given = ", ".join(sorted(set(frame["component"].astype(str))))
        raise InputError("component", given, f"give some of {', '.join(COMPONENTS)}")
    layers = sorted(frame["layer"].unique())
    rows_of_heads = frame["head"].notna() & (frame["head"].astype(str) != "")
    heads = frame.loc[rows_of_heads, "head"].astype(int)
    n_heads = int(heads.max()) + 1 if len(heads) else 1
    has_heads = {c: bool(rows_of_heads[frame["component"] == c].any()) for c in components}

    widths = [n_heads if has_heads[c] else max(1.0, 0.3 * n_heads) for c in components]
    figure = make_subplots(
        rows=1,
        cols=len(components) + 1,
        shared_yaxes=True,
        horizontal_spacing=0.012,
        column_widths=[*widths, n_heads],
        subplot_titles=[*components, "sum of layer"],
    )
    for col, component in enumerate(components, start=1):
        with_heads = has_heads[component]
        panel = _component_panel(frame, component, layers, with_heads)
        figure.add_trace(panel, row=1, col=col)
        figure.update_xaxes(
            title_text="head" if with_heads else "",
            showticklabels=with_heads,
            dtick=max(1, n_heads // 4),
            showgrid=False,
            row=1,
            col=col,
        )
    figure.add_trace(_layer_sums(frame, layers), row=1, col=len(components) + 1)
    figure.update_yaxes(showgrid=False, type="category")
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure = styled(figure, title=title, width=1150, height=max(320, 30 * len(layers) + 170))
    scale = {"colorscale": BLUES, "cmin": 0, "colorbar": colorbar("gradient", units)}
    return figure.update_layout(coloraxis=scale, margin_t=100)


def _component_panel(
    frame: pd.DataFrame, component: str, layers: Sequence[int], has_heads: bool
) -> Heatmap:
    import plotly.graph_objects as go

    rows = frame[frame["component"] == component]
    columns = rows["head"].astype(int) if has_heads else 0
    values = rows.assign(at=columns).pivot_table(index="layer", columns="at", values="value")
    values = values.reindex(layers)
    return go.Heatmap(
        z=values.to_numpy(),
        x=[int(c) for c in values.columns],
        y=[str(layer) for layer in layers],
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate=f"{component}, layer %{{y}}"
        + (", head %{x}" if has_heads else "")
        + ": %{z:.4g}<extra></extra>",
    )


def _layer_sums(frame: pd.DataFrame, layers: Sequence[int]) -> Bar:
    import plotly.graph_objects as go

    sums = frame.groupby("layer")["value"].sum().reindex(layers)
    share = sums / (sums.sum() or 1.0)
    return go.Bar(
        x=sums,
        y=[str(layer) for layer in layers],
        orientation="h",
        marker_color=SERIES[0],
        showlegend=False,
        text=[f"{100 * s:.0f} %" for s in share],
        textposition="auto",
        hovertemplate="layer %{y}: %{x:.4g} (%{text} of all)<extra></extra>",
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
        panels: site (`"z"`, `"q"`, ...) to array [layer, head] or [layer, position].
        title: title.
        name: what the values are.
        units: their unit.
        reverse: orange below zero instead of above.
        row_label: name of the rows.
        col_label: name of the columns.
        col_names: one per column, such as the prefix's tokens (default: its number).
    """
    from plotly.subplots import make_subplots

    if not panels:
        raise InputError("panels", "empty", "give at least one site with its array")
    arrays = {site: matrix(values, f"panels[{site!r}]") for site, values in panels.items()}
    n_rows, n_cols = next(iter(arrays.values())).shape
    n_panels, stacked = len(arrays), n_cols > MANY_COLUMNS
    figure = make_subplots(
        rows=n_panels if stacked else 1,
        cols=1 if stacked else n_panels,
        subplot_titles=[escaped(site) for site in arrays],
        shared_yaxes=not stacked,
        shared_xaxes=stacked,
        horizontal_spacing=0.03,
        vertical_spacing=0.3 / n_panels,
    )
    labels = _Labels(escaped(row_label), escaped(col_label), col_names)
    for index, array in enumerate(arrays.values()):
        row, col = (index + 1, 1) if stacked else (1, index + 1)
        at_bottom, at_left = not stacked or index == n_panels - 1, stacked or index == 0
        _add_panel(figure, array, row, col, labels, at_bottom=at_bottom, at_left=at_left)

    panel_height = 60 + 26 * n_rows
    width = 1000 if stacked else 200 + 260 * n_panels
    height = 130 + (panel_height + 40) * n_panels if stacked else panel_height + 150
    figure = styled(figure, title=title, width=width, height=height)
    limit = max(float(np.nanmax(np.abs(a))) for a in arrays.values()) or 1.0
    scale = {
        "colorscale": SIGNED,
        "reversescale": reverse,
        "cmin": -limit,
        "cmax": limit,
        "colorbar": colorbar(name, units),
    }
    return figure.update_layout(coloraxis=scale, margin_t=100)


class _Labels(NamedTuple):
    """Names of the axes, escaped, and of the columns."""

    row: str
    col: str
    columns: Sequence[str]


def _add_panel(
    figure: Figure,
    array: np.ndarray,
    row: int,
    col: int,
    labels: _Labels,
    *,
    at_bottom: bool,
    at_left: bool,
) -> None:
    """Add one site; only panels at the bottom and at the left name their axes."""
    import plotly.graph_objects as go

    n_rows, n_cols = array.shape
    panel = go.Heatmap(
        z=array,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate=f"{labels.row} %{{y}}, {labels.col} %{{x}}: %{{z:.4g}}<extra></extra>",
    )
    figure.add_trace(panel, row=row, col=col)
    figure.update_xaxes(showgrid=False, row=row, col=col)
    figure.update_yaxes(showgrid=False, dtick=max(1, n_rows // 8), row=row, col=col)
    if at_bottom:
        figure.update_xaxes(title_text=labels.col, row=row, col=col)
    if at_left:
        figure.update_yaxes(title_text=labels.row, row=row, col=col)
    if labels.columns:
        names = [escaped(visible(str(c), 16, tell=False)) for c in labels.columns]
        figure.update_xaxes(
            tickvals=list(range(n_cols)), ticktext=names, tickangle=-60, row=row, col=col
        )
