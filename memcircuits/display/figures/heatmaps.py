"""One matrix as coloured cells: a value for each head, or one head's attention pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memcircuits.base.errors import InputError
from memcircuits.display.figures.style import BLUES, SIGNED, colorbar, escaped, styled
from memcircuits.display.numbers import cells, matrix
from memcircuits.display.text import number, visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MARK = {"color": "#d5006c", "width": 2.5}  # the frame of a marked cell
PREFIX_END = {"color": "#d55e00", "dash": "dot", "width": 1.5}


def heatmap(  # noqa: PLR0913 (keyword-only options of a public function)
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
        values: array [row, col]; NaN stays blank (not measured).
        title: title.
        name: what the values are.
        units: their unit.
        diverging: colours around zero (default: if any value is negative).
        reverse: orange below zero instead of above.
        row_label: name of the rows.
        col_label: name of the columns.
        row_names: one per row (default: its number).
        col_names: one per column (default: its number).
        marks: cells to frame, such as significant ones: pairs (row, col), or booleans [row, col].
        hover: further text per cell, [row][col].
    """
    import plotly.graph_objects as go

    array = matrix(values)
    n_rows, n_cols = array.shape
    rows = [escaped(r) for r in row_names or range(n_rows)]
    cols = [escaped(c) for c in col_names or range(n_cols)]

    # One entry per cell: "layer 1, head 2 / score: 0.1 nats".
    tips = [
        [
            f"{escaped(row_label)} {row}, {escaped(col_label)} {col}<br>{escaped(name)}: "
            f"{number(float(array[i, j]), 4)} {escaped(units)}"
            + (f"<br>{escaped(hover[i][j])}" if hover else "")
            for j, col in enumerate(cols)
        ]
        for i, row in enumerate(rows)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=array,
            text=tips,
            hovertemplate="%{text}<extra></extra>",
            reversescale=reverse,
            xgap=1,
            ygap=1,
            colorbar=colorbar(name, units),
            **_colours(array, diverging),
        )
    )
    for row, col in cells(marks, array.shape):
        box = {"x0": col - 0.5, "x1": col + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        figure.add_shape(type="rect", **box, line=MARK)
    figure.update_xaxes(title_text=escaped(col_label), showgrid=False)
    figure.update_xaxes(tickvals=list(range(n_cols)), ticktext=cols)
    figure.update_yaxes(title_text=escaped(row_label), showgrid=False)
    figure.update_yaxes(tickvals=list(range(n_rows)), ticktext=rows)
    width = min(1100, max(420, 40 * n_cols + 200))
    return styled(figure, title=title, width=width, height=max(300, 34 * n_rows + 150))


def attention_pattern(
    values: Any, tokens: Sequence[str], *, n_prefix: int = 0, title: str = ""
) -> Figure:
    """One head's attention pattern, queries downwards; a line ends the prefix.

    Args:
        values: array [query, key] of probabilities.
        tokens: text of each token.
        n_prefix: where the continuation begins (0: no line).
        title: title.
    """
    import plotly.graph_objects as go

    array = matrix(values)
    n = len(tokens)
    if array.shape != (n, n):
        raise InputError("values", f"shape {array.shape}", f"give [{n}, {n}], one row per token")
    names = [escaped(visible(token, 16, tell=False)) for token in tokens]
    future = np.triu(np.ones((n, n), dtype=bool), 1)
    tips = [[f"{names[q]} ({q}) attends to {names[k]} ({k})" for k in range(n)] for q in range(n)]
    figure = go.Figure(
        go.Heatmap(
            z=np.where(future & (array == 0), np.nan, array),  # later tokens cannot be seen
            text=tips,
            hovertemplate="%{text}: %{z:.3f}<extra></extra>",
            hoverongaps=False,
            colorscale=BLUES,
            zmin=0,
            zmax=1,
            colorbar=colorbar("attention", ""),
        )
    )
    if 0 < n_prefix < n:
        figure.add_hline(y=n_prefix - 0.5, line=PREFIX_END)
        figure.add_vline(x=n_prefix - 0.5, line=PREFIX_END)
    labelled = list(range(0, n, max(1, n // 25)))
    axis = {"tickvals": labelled, "ticktext": [names[i] for i in labelled], "showgrid": False}
    figure.update_xaxes(title_text="key token", tickangle=-60, **axis)
    figure.update_yaxes(title_text="query token", autorange="reversed", **axis)
    return styled(figure, title=title, width=760, height=740)


def _colours(array: np.ndarray, diverging: bool | None) -> dict[str, Any]:
    """Colour scale and its ends: around zero if values have a sign, else from zero."""
    if diverging is None:
        diverging = bool((array < 0).any())
    largest = float(np.nanmax(np.abs(array))) if np.isfinite(array).any() else 1.0
    lowest = min(0.0, float(np.nanmin(array, initial=0.0)))
    return {
        "colorscale": SIGNED if diverging else BLUES,
        "zmin": -largest if diverging else lowest,
        "zmax": largest or 1.0,
    }
