"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from memcircuits.display.figures.style import (
    GREY,
    add_lines,
    escaped,
    interval_columns,
    require_columns,
    styled,
)
from memcircuits.display.palette import SERIES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def arms(frame: pd.DataFrame, *, title: str = "", y_label: str = "exact match (tokens)") -> Figure:
    """Each arm of an unlearning or editing run, memorized beside control (the paper's figure 5).

    Args:
        frame: Columns ``arm, value`` and if wanted ``set, value_low, value_high``.
        title: Title.
        y_label: What the values are.
    """
    import plotly.graph_objects as go

    require_columns(frame, "arm", "value")
    figure = go.Figure()
    groups = frame.groupby("set", sort=False) if "set" in frame.columns else [("", frame)]
    for index, (name, group) in enumerate(groups):
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
    interval = interval_columns(frame, column)
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


def minimal_sets(stopping: pd.DataFrame, starting: pd.DataFrame, *, title: str = "") -> Figure:
    """How few prefix tokens stop a recitation (left), and how few start it (right).

    Args:
        stopping: Columns ``replaced, em`` and if wanted an interval.
        starting: Columns ``given, em`` and if wanted an interval.
        title: Title.
    """
    from plotly.subplots import make_subplots

    require_columns(stopping, "replaced", "em")
    require_columns(starting, "given", "em")
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    for col, (frame, x, label) in enumerate(
        (
            (stopping, "replaced", "prefix tokens replaced, worst first"),
            (starting, "given", "last prefix tokens given"),
        ),
        start=1,
    ):
        add_lines(figure, frame, x, "em", row=1, col=col, legend=False, markers=len(frame) <= 20)
        figure.update_xaxes(title_text=label, row=1, col=col)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="exact match (tokens)", row=1, col=1)
    return styled(figure, title=title, width=860, height=380)
