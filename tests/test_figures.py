"""Figures hold the numbers they were given, share one look, and refuse what does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from memcircuits import figures

LAYERS, HEADS = 4, 3


def gradients() -> pd.DataFrame:
    rows = [
        (component, layer, head, 1.0 + layer + 10 * head)
        for component in figures.COMPONENTS[:4]
        for layer in range(LAYERS)
        for head in range(HEADS)
    ]
    rows += [(c, layer, None, 2.0) for c in figures.COMPONENTS[4:] for layer in range(LAYERS)]
    frame = pd.DataFrame(rows, columns=["component", "layer", "head", "value"])
    frame["head"] = frame["head"].astype("Int64")
    return frame


def curve(x: str, xs: list[int], *columns: str) -> pd.DataFrame:
    rows = [(at, name, *[float(at + i) for i in range(len(columns))]) for name in "ab" for at in xs]
    return pd.DataFrame(rows, columns=[x, "set", *columns])


def repetitions() -> pd.DataFrame:
    """As `Scan.by_repetitions` gives it: standard errors, missing where n is 1."""
    frame = pd.DataFrame({"repetitions": [1, 2, 4], "em": [0.5, 3.0, 40.0], "nll": [3.0, 2.5, 0.1]})
    return frame.assign(em_se=[0.1, 0.2, np.nan], nll_se=[0.1, 0.1, np.nan])


EVERY: dict[str, Callable[[], go.Figure]] = {
    "heatmap": lambda: figures.heatmap(torch.randn(LAYERS, HEADS), title="t", units="nats"),
    "gradient_map": lambda: figures.gradient_map(gradients(), title="t"),
    "perturbation": lambda: figures.perturbation_curves(
        curve("position", [0, 1, 2], "em", "nll", "em_low", "em_high"), title="t"
    ),
    "duplication": lambda: figures.duplication_curve(repetitions(), title="t"),
    "em_against_nll": lambda: figures.em_against_nll(
        pd.DataFrame(
            {"em": [50, 3], "nll": [0.1, 3.0], "memorized": [True, False], "id": ["a", "b"]}
        )
    ),
    "rank": lambda: figures.attention_by_rank(
        curve("rank", [1, 2, 3], "attention", "null_low", "null_high"), title="t"
    ),
    "arms": lambda: figures.arms(
        pd.DataFrame({"arm": ["x", "y"], "value": [1.0, 2.0], "set": ["a", "b"]}), title="t"
    ),
    "leaderboard": lambda: figures.leaderboard(
        pd.DataFrame({"method": ["x", "y"], "score": [0.2, 0.1]}), chance=0.05
    ),
    "patching": lambda: figures.patching_map({"z": np.eye(3), "q": -np.eye(3)}, title="t"),
    "positions": lambda: figures.patching_map(
        {"z": np.zeros((3, 50))}, col_label="position", col_names=["<b>"] * 50
    ),
    "pattern": lambda: figures.attention_pattern(np.eye(3), ["a", "\n", "<b>"], n_prefix=2),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_valid_and_shares_one_look(name: str) -> None:
    before = pio.templates.default
    figure = EVERY[name]()
    assert isinstance(figure, go.Figure)
    assert figure.layout.template.layout.font.family.startswith("Arial")
    assert figure.layout.paper_bgcolor is None  # it comes from the template alone
    assert figure.layout.width <= 1200
    assert len(figure.data) >= 1
    assert pio.templates.default == before
    assert "<b>" not in figure.to_json()


def test_heatmap_keeps_values_gaps_and_marks() -> None:
    values = np.array([[0.1, np.nan], [-0.4, 0.2]])
    figure = figures.heatmap(values, marks=np.array([[False, False], [False, True]]))
    np.testing.assert_array_equal(figure.data[0].z, values)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-0.4, 0.4)  # signed: around zero
    assert "layer 1, head 0" in figure.data[0].text[1][0]
    (mark,) = figure.layout.shapes
    assert (mark.x0, mark.x1, mark.y0, mark.y1) == (0.5, 1.5, 0.5, 1.5)
    assert figures.heatmap(np.abs(values)).data[0].zmin == 0


def test_gradient_map_has_the_papers_columns_and_layer_sums() -> None:
    frame = gradients()
    figure = figures.gradient_map(frame)
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [*figures.COMPONENTS, "sum of layer"]
    assert [t.z.shape for t in figure.data[:-1]] == [(LAYERS, HEADS)] * 4 + [(LAYERS, 1)] * 2
    assert figure.data[0].z[2, 1] == 13.0
    np.testing.assert_allclose(figure.data[-1].x, frame.groupby("layer")["value"].sum())


def test_duplication_curve_bands_are_standard_errors() -> None:
    figure = figures.duplication_curve(repetitions())
    band = next(t for t in figure.data if t.fill == "toself")
    assert list(band.x) == [1, 2, 2, 1]  # the point without an error has no band
    assert band.y[0] == pytest.approx(0.5 + 1.96 * 0.1)
    assert figure.layout.xaxis.type == "log"


def test_series_differ_in_more_than_colour() -> None:
    lines = [t for t in EVERY["rank"]().data if t.name in {"a", "b"}]
    assert lines[0].line.dash != lines[1].line.dash
    assert lines[0].marker.symbol != lines[1].marker.symbol
    bars = EVERY["arms"]().data
    assert bars[0].marker.pattern.shape != bars[1].marker.pattern.shape


def test_leaderboard_puts_the_best_on_top() -> None:
    assert list(EVERY["leaderboard"]().data[0].y) == ["y", "x"]  # plotly draws upwards


def test_patching_panels_share_one_scale_around_zero() -> None:
    axis = figures.patching_map({"z": np.eye(3), "q": -3 * np.eye(3)}).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: figures.heatmap([1.0]), "row, col"),
        (lambda: figures.heatmap([[np.inf]]), "infinite"),
        (lambda: figures.gradient_map(pd.DataFrame({"layer": [1]})), "component"),
        (lambda: figures.gradient_map(gradients().assign(component="W")), "W_K"),
        (lambda: figures.perturbation_curves(pd.DataFrame({"position": [1]})), "em"),
        (lambda: figures.duplication_curve(repetitions().assign(repetitions=0)), "logarithmic"),
        (lambda: figures.arms(pd.DataFrame({"arm": [], "value": []})), "no rows"),
        (lambda: figures.patching_map({}), "site"),
        (lambda: figures.attention_pattern(np.eye(3), ["a"]), "one row per token"),
    ],
)
def test_bad_input_is_named(make: Callable[[], go.Figure], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_figures_leaves_plotly_alone() -> None:
    code = "import sys, memcircuits.figures; print({'torch', 'plotly'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
