"""Bars: arms of an edit, methods of the benchmark, bits of tokens; panels of minimal sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from memcircuits.display.figures.style import (
    GREY,
    INK,
    add_lines,
    by_set,
    escaped,
    interval_columns,
    require_columns,
    styled,
)
from memcircuits.display.palette import SERIES
from memcircuits.display.text import visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def arms(frame: pd.DataFrame, *, title: str = "", y_label: str = "exact match (tokens)") -> Figure:
    """Each arm of an unlearning or editing run, memorized beside control (the paper's figure 5).

    Args:
        frame: columns `arm, value` and if wanted `set, value_low, value_high`.
        title: title.
        y_label: what the values are.
    """
    import plotly.graph_objects as go

    require_columns(frame, "arm", "value")
    figure = go.Figure()
    for index, (name, group) in enumerate(by_set(frame)):
        figure.add_trace(
            go.Bar(
                x=[escaped(a) for a in group["arm"]],
                y=group["value"],
                name=escaped(name),
                showlegend=bool(name),
                marker={
                    "color": SERIES[index % len(SERIES)],
                    "pattern": {"shape": ("", "/", "x", ".")[index % 4], "solidity": 0.35},
                },
                error_y=_whiskers(group, "value"),
                hovertemplate="%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_yaxes(title_text=escaped(y_label), rangemode="tozero")
    figure.update_xaxes(showgrid=False)
    return styled(figure, title=title, width=760, height=420).update_layout(barmode="group")


def _whiskers(frame: pd.DataFrame, column: str) -> dict[str, Any] | None:
    """Error bars from a frame's interval, where it has one."""
    bounds = interval_columns(frame, column)
    if bounds is None:
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": (bounds[1] - frame[column]).tolist(),
        "arrayminus": (frame[column] - bounds[0]).tolist(),
        "color": INK,
        "thickness": 1.3,
    }


def leaderboard(
    frame: pd.DataFrame, *, title: str = "", x_label: str = "recall", chance: float | None = None
) -> Figure:
    """Localization methods, best on top.

    Args:
        frame: columns `method, score` and if wanted `score_low, score_high`.
        title: title.
        x_label: what the score is.
        chance: what guessing scores: a dashed line.
    """
    import plotly.graph_objects as go

    require_columns(frame, "method", "score")
    ranked = frame.sort_values("score")
    figure = go.Figure(
        go.Bar(
            x=ranked["score"],
            y=[escaped(m) for m in ranked["method"]],
            orientation="h",
            marker_color=SERIES[0],
            error_x=_whiskers(ranked, "score"),
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    if chance is not None:
        figure.add_vline(
            x=chance,
            line={"dash": "dash", "color": GREY},
            annotation_text=f"chance {chance:.3g}",
            annotation_position="top",
        )
    figure.update_xaxes(title_text=escaped(x_label), rangemode="tozero")
    figure.update_yaxes(showgrid=False)
    return styled(figure, title=title, width=760, height=max(280, 34 * len(ranked) + 150))


def token_bits(frame: pd.DataFrame, parts: Sequence[str], *, title: str = "") -> Figure:
    """What each token of a paragraph is known from: bits stacked, negative ones below zero.

    Args:
        frame: columns `position, text` and one column of bits for each part.
        parts: names of these columns, the lowest first.
        title: title.
    """
    import plotly.graph_objects as go

    require_columns(frame, "position", "text", *parts)
    names = [escaped(visible(str(text), 16, tell=False)) for text in frame["text"]]
    figure = go.Figure()
    for index, part in enumerate(parts):
        figure.add_trace(
            go.Bar(
                x=frame["position"],
                y=frame[part],
                name=escaped(part),
                marker={
                    "color": SERIES[index % len(SERIES)],
                    "pattern": {"shape": ("", "/", "x", ".")[index % 4], "solidity": 0.35},
                },
                customdata=names,
                hovertemplate="%{customdata} (%{x}): %{y:.2f} bits<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_xaxes(
        title_text="token of the continuation",
        tickvals=frame["position"].tolist(),
        ticktext=names,
        tickangle=-60,
        showgrid=False,
    )
    figure.update_yaxes(title_text="bits")
    width = min(1400, 220 + 20 * len(frame))
    return styled(figure, title=title, width=width, height=460).update_layout(barmode="relative")


def minimal_sets(stopping: pd.DataFrame, starting: pd.DataFrame, *, title: str = "") -> Figure:
    """The number of prefix tokens that stops a recitation (left), or starts it (right).

    Args:
        stopping: columns `replaced, em` and if wanted an interval.
        starting: columns `given, em` and if wanted an interval.
        title: title.
    """
    from plotly.subplots import make_subplots

    require_columns(stopping, "replaced", "em")
    require_columns(starting, "given", "em")
    panels = (
        (stopping, "replaced", "prefix tokens replaced, worst first"),
        (starting, "given", "last prefix tokens given"),
    )
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    for col, (frame, x, label) in enumerate(panels, start=1):
        add_lines(figure, frame, x, "em", row=1, col=col, legend=False, markers=len(frame) <= 20)
        figure.update_xaxes(title_text=label, row=1, col=col)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="exact match (tokens)", row=1, col=1)
    return styled(figure, title=title, width=860, height=380)
