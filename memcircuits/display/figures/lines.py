"""Line figures: loss, exact match and attention over positions, ranks and repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from memcircuits.base.errors import InputError
from memcircuits.display.figures.style import (
    GREY,
    MARKERS,
    add_lines,
    band,
    escaped,
    require_columns,
    styled,
)
from memcircuits.display.palette import SERIES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def curves(
    frame: pd.DataFrame,
    x: str,
    panels: Mapping[str, str],
    *,
    title: str = "",
    x_label: str = "",
    markers: bool = True,
) -> Figure:
    """Lines against `x`, in panels over one another that share that axis.

    Args:
        frame: column `x`, the columns of `panels` and if wanted `set` and intervals.
        x: column along the bottom.
        panels: column to what it is, with units; those that the frame lacks are left out, but for
            the first.
        title: title.
        x_label: what `x` is.
        markers: whether each point gets a mark.
    """
    from plotly.subplots import make_subplots

    require_columns(frame, x, next(iter(panels)))
    present = {column: label for column, label in panels.items() if column in frame.columns}
    figure = make_subplots(rows=len(present), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for row, (column, label) in enumerate(present.items(), start=1):
        add_lines(figure, frame, x, column, row=row, legend=row == 1, markers=markers)
        figure.update_yaxes(title_text=label, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text=x_label, row=len(present), col=1)
    return styled(figure, title=title, width=720, height=130 + 230 * len(present))


def perturbation_curves(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """What replacing one prefix token does to the continuation (the paper's figure 3).

    Args:
        frame: columns `position, em` and if wanted `nll, set` and intervals.
        title: title.
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
        frame: columns `repetitions, em` and if wanted `nll, set` and intervals.
        title: title.
    """
    require_columns(frame, "repetitions")
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
        frame: columns `em, nll` and if wanted `memorized` and `id`.
        title: title.
    """
    import plotly.graph_objects as go

    require_columns(frame, "em", "nll")
    known = "memorized" in frame.columns
    memorized = frame["memorized"].astype(bool) if known else pd.Series(False, index=frame.index)
    figure = go.Figure()
    for index, (name, members) in enumerate((("memorized", memorized), ("others", ~memorized))):
        group = frame[members]
        if len(group):
            figure.add_trace(
                go.Scattergl(
                    x=group["nll"],
                    y=group["em"],
                    mode="markers",
                    name=name,
                    showlegend=known,
                    text=[escaped(i) for i in group["id"]] if "id" in group.columns else None,
                    marker={"symbol": MARKERS[index], "color": SERIES[index], "opacity": 0.6},
                    hovertemplate="%{text}<br>EM %{y}, NLL %{x:.3f}<extra>%{fullData.name}</extra>",
                )
            )
    figure.update_xaxes(title_text="NLL of the continuation (nats/token)", rangemode="tozero")
    top = max(1.0, float(frame["em"].max()))
    margin = 0.03 * top  # else the many points at 0 would be cut in half
    figure.update_yaxes(title_text="exact match (tokens)", range=[-margin, top + 2 * margin])
    return styled(figure, title=title, width=720, height=420)


def em_against_em(frame: pd.DataFrame, *, labels: Sequence[str], title: str = "") -> Figure:
    """How much of each paragraph two models recite; many may share a place, so areas count them.

    Args:
        frame: columns `em_a, em_b`.
        labels: names of both models.
        title: title.
    """
    import plotly.graph_objects as go

    require_columns(frame, "em_a", "em_b")
    places = frame.groupby(["em_a", "em_b"], as_index=False).size()
    top = max(1.0, float(frame[["em_a", "em_b"]].to_numpy().max()))
    figure = go.Figure(
        go.Scatter(
            x=places["em_a"],
            y=places["em_b"],
            mode="markers",
            customdata=places["size"],
            marker={
                "color": SERIES[0],
                "opacity": 0.7,
                "size": places["size"],
                "sizemode": "area",
                "sizeref": 2 * places["size"].max() / 30**2,
                "sizemin": 3,
            },
            hovertemplate="EM %{x} and %{y}: %{customdata} paragraphs<extra></extra>",
        )
    )
    figure.add_shape(type="line", x0=0, y0=0, x1=top, y1=top, line={"color": GREY, "dash": "dot"})
    names = [escaped(label) for label in labels]
    span = [-0.06 * top, 1.06 * top]
    figure.update_xaxes(title_text=f"exact match of {names[0]} (tokens)", range=span)
    figure.update_yaxes(title_text=f"exact match of {names[1]} (tokens)", range=span)
    return styled(figure, title=title, width=480, height=480)


def attention_by_rank(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Attention to prefix tokens against their frequency rank (the paper's figure 7).

    Args:
        frame: columns `rank, attention` (mean attention per token at that rank), if wanted
            `set` (such as the head), `attention_low, attention_high`, and the band in which
            attention lies when ranks are shuffled within paragraphs: `null_low, null_high`.
        title: title.
    """
    from plotly.subplots import make_subplots

    require_columns(frame, "rank", "attention")
    figure = make_subplots(rows=1, cols=1)
    if {"null_low", "null_high"} <= set(frame.columns):
        null = frame.groupby("rank", as_index=False)[["null_low", "null_high"]].agg(
            {"null_low": "min", "null_high": "max"}
        )
        name = "ranks shuffled within paragraphs"
        area = band(
            null["rank"], null["null_low"], null["null_high"], colour=GREY, alpha=0.25, name=name
        )
        figure.add_trace(area)
    add_lines(figure, frame, "rank", "attention", row=1, legend=True, markers=True)
    figure.update_xaxes(title_text="frequency rank within the prefix (1 = rarest)")
    figure.update_yaxes(title_text="attention per token", rangemode="tozero")
    return styled(figure, title=title, width=720, height=400)


def noise_curves(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Exact match and NLL against the size of noise on weights.

    Args:
        frame: columns `size, em` and if wanted `nll, set` and intervals.
        title: title.
    """
    require_columns(frame, "size", "em")
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
