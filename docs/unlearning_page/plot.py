"""The picture of the front: remembered bits left against the KL on unseen controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from memcircuits.display.figures.style import MARKERS, styled
from memcircuits.display.palette import SERIES
from unlearning_page.numbers import read
from unlearning_page.rivals import RIVALS

PICTURE = Path(__file__).parents[1] / "pictures" / "unlearning.png"
SHORT = {
    "deep": "deep",
    "twin": "deep, the twin given",
    "deep-0.01": "deep, 1 % of the weights",
    "plain": "deep, not whitened",
    **{name: rival.label.partition(",")[0].partition(":")[0] for name, rival in RIVALS.items()},
    "published": "the paper's recipe as published",
    "surface": "surface",
    "never": "never trained on it",
}


def plot(runs: Mapping[str, dict[str, Any]]) -> None:
    """Write the picture: a point for each edit of a paragraph."""
    figure = go.Figure()
    for number, (name, label) in enumerate(SHORT.items()):
        mine = read(runs, name)
        figure.add_scatter(
            x=[run["kl"] for run in mine],
            y=[run["remembered"] for run in mine],
            name=label,
            mode="markers",
            marker={
                "symbol": MARKERS[number % len(MARKERS)] + "-open" * (number >= len(MARKERS)),
                "size": 9,
                "color": SERIES[number % len(SERIES)],
            },
        )
    figure.update_xaxes(type="log", title="KL on unseen controls (nats/token)")
    figure.update_yaxes(title="remembered bits left (share)", range=[-1, 1.05])
    title = "Forgetting one paragraph: what is left, and what it costs"
    styled(figure, title=title, width=900, height=440)
    beside = {"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"}
    figure.update_layout(legend=beside, margin={"t": 60})
    figure.write_image(PICTURE, scale=2)
