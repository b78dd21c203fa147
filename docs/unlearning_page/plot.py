"""The picture of the front: remembered bits left against the KL on unseen controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import plotly.graph_objects as go

from memcircuits.display.figures.style import MARKERS, styled
from memcircuits.display.palette import SERIES
from unlearning_page.front import FRACTION, RIVALS, arms, chosen_rates
from unlearning_page.numbers import read

PICTURE = Path(__file__).parents[1] / "pictures" / "unlearning.png"
FAMILIES = {
    "deep": "deep",
    "fraction": f"deep, {FRACTION:.0%} of the weights",
    "twin": "deep, the twin given",
    "plain": "deep, not whitened",
    **{name: label.partition(",")[0].partition(":")[0] for name, label in RIVALS.items()},
    "published": "the paper's recipe as published",
    "surface": "surface",
    "never": "never trained on it",
}


def plot(runs: Mapping[str, dict[str, Any]]) -> None:
    """Write the picture; points of one family are joined in the order of the table."""
    figure = go.Figure()
    names = [*arms(chosen_rates(runs)), "never"]
    for number, (family, label) in enumerate(FAMILIES.items()):
        groups = [read(runs, name) for name in names if name.partition("-")[0] == family]
        colour = SERIES[number % len(SERIES)]
        figure.add_scatter(
            x=[mean(run["kl"] for run in group) for group in groups],
            y=[mean(run["remembered"] for run in group) for group in groups],
            name=label,
            mode="lines+markers",
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 9, "color": colour},
            line={"color": colour, "width": 1},
        )
    figure.update_xaxes(type="log", title="KL on unseen controls (nats/token)")
    figure.update_yaxes(title="remembered bits left (share)", range=[-0.3, 1.05])
    title = "Forgetting one paragraph: what is left, and what it costs"
    styled(figure, title=title, width=760, height=440).write_image(PICTURE, scale=2)
