"""Figures hold the numbers they were given, share one look, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from memcircuits.display import figures
from memcircuits.editing.edit import Edit
from memcircuits.editing.edit_report import EditReport, edit_arms
from memcircuits.editing.noise import NoiseCurve
from memcircuits.editing.relearning import Recovery
from memcircuits.evidence.rare_tokens import RareTokenAttention
from memcircuits.evidence.triggers.minimal_sets import MinimalSets
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap
from tests.helpers.results import result_types

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
    "noise": lambda: figures.noise_curves(
        curve("size", [0, 1, 2], "em", "nll", "em_low", "em_high"), title="t"
    ),
    "minimal": lambda: figures.minimal_sets(
        pd.DataFrame({"replaced": [0, 1], "em": [50.0, 3.0]}),
        pd.DataFrame({"given": [1, 2], "em": [0.0, 9.0], "em_low": 0.0, "em_high": 50.0}),
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


def test_long_titles_are_broken_into_lines() -> None:
    title = "A memorized paragraph with <b> and a very long name of its own indeed"
    figure = figures.heatmap(np.eye(3), title=title)
    lines = figure.layout.title.text
    assert lines.replace("<br>", " ") == title.replace("<b>", "&lt;b&gt;")
    assert max(map(len, lines.split("<br>"))) <= figure.layout.width // 8


def test_gradient_map_has_the_papers_columns_and_layer_sums() -> None:
    frame = gradients()
    figure = figures.gradient_map(frame)
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [*figures.COMPONENTS, "sum of layer"]
    assert [t.z.shape for t in figure.data[:-1]] == [(LAYERS, HEADS)] * 4 + [(LAYERS, 1)] * 3
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


def test_noise_sizes_are_evenly_spaced_and_named() -> None:
    figure = EVERY["noise"]()
    axis = figure.layout.xaxis2  # of the lower panel
    assert list(axis.ticktext) == ["none", "1", "2"]
    assert list(axis.tickvals) == [0, 1, 2]


PROVENANCE = Provenance({"name": "m", "basis": "raw"}, {}, {}, {})


def lines_of(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.fill is None]


def test_every_result_has_a_figure_of_its_own() -> None:
    types = result_types()
    assert len(types) >= 10
    assert [kind for kind, cls in types.items() if cls.figure is Result.figure] == []
    assert [kind for kind, cls in types.items() if cls.to_frame is Result.to_frame] == []


def test_noise_curve_draws_means_over_draws_and_paragraphs() -> None:
    em = torch.tensor([[[50.0, 50.0]], [[10.0, 30.0]]])  # [size, draw, paragraph]
    groups = {"memorized": em, "control": em - 5}
    curve = NoiseCurve(torch.tensor([0.0, 0.1]), groups, groups, 10, 1000, PROVENANCE)
    em_lines = lines_of(curve.figure())[:2]
    assert [list(line.y) for line in em_lines] == [[50, 20], [45, 15]]
    assert [line.name for line in em_lines] == ["memorized", "control"]


def test_recovery_draws_both_arms() -> None:
    em = torch.tensor([[[0, 2], [4, 6]], [[50, 50], [49, 51]]])
    recovery = Recovery(em, torch.tensor([0, 5]), PROVENANCE)
    edited, unedited = lines_of(recovery.figure())
    assert (list(edited.x), list(edited.y), list(unedited.y)) == ([0, 5], [1, 5], [50, 50])


def test_edit_draws_its_steps_and_marks_the_one_kept() -> None:
    history = {"em": torch.tensor([50.0, 20.0, 1.0]), "kl": torch.tensor([0.0, 0.1, 0.4])}
    one = {"0.W_in": torch.tensor([0, 7])}
    edit = Edit(
        one,
        {"0.W_in": torch.tensor([0.5, -1.0])},
        {"0.W_in": torch.tensor([9.0])},
        1000,
        PROVENANCE,
        history,
        kept=1,
    )
    figure = edit.figure()
    assert [list(line.y) for line in lines_of(figure)] == [
        [50, 20, 1],
        pytest.approx([0, 0.1, 0.4]),
    ]
    assert {shape.x0 for shape in figure.layout.shapes} == {1}
    plain = dataclasses.replace(edit, history={}).figure()
    assert plain.data[0].z[0, 0] == pytest.approx(1.25**0.5)


def test_edit_reports_stand_side_by_side_as_arms() -> None:
    def report(after: float) -> EditReport:
        both = torch.tensor([[50.0, 50.0], [after, after + 2]])
        samples = {"memorized/em": both, "control/em": both - 1, "control/kl": both * 0}
        return EditReport(samples, 10, PROVENANCE)

    table = edit_arms({"before": report(3), "top 0.1 %": report(3), "random": report(40)})
    assert table[table["set"] == "memorized"]["value"].tolist() == [50, 4, 41]
    assert (table["value_low"] <= table["value"]).all()
    bars = report(3).figure().data
    assert [list(bar.y) for bar in bars] == [[50, 4], [49, 3]]
    assert list(bars[0].x) == ["before", "after"]


def test_minimal_sets_draw_stopping_and_starting() -> None:
    minimal_sets = MinimalSets(
        positions=torch.tensor([[3, -1], [4, 5]]),
        replacements=torch.tensor([[9, -1], [9, 9]]),
        em=torch.tensor([[1, 1], [20, 3]]),
        baseline_em=torch.tensor([50, 40]),
        suffix_em=torch.tensor([[0, 10, 50], [0, 30, 40]]),
        threshold=10,
        names=("a", "b"),
        provenance=PROVENANCE,
    )
    stop, start = lines_of(minimal_sets.figure())
    assert (list(stop.x), list(stop.y)) == ([0, 1, 2], [45, 10.5, 2])
    assert (list(start.x), list(start.y)) == ([1, 2, 3], [0, 20, 45])


def rare(attention: torch.Tensor, counts: torch.Tensor) -> RareTokenAttention:
    shape = attention.shape[1:3]
    return RareTokenAttention(
        "tau",
        "tau-b",
        torch.zeros(shape),
        PROVENANCE,
        attention=attention,
        counts=counts,
        null=torch.zeros(3, *shape),
    )


def test_attention_by_rank_by_hand() -> None:
    """Two paragraphs of four tokens; ties share a rank and are averaged within the paragraph."""
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.1, 0.3]])[:, None, None]
    counts = torch.tensor([[7, 1, 7, 3], [2, 2, 9, 4]])
    frame = rare(attention, counts).by_rank((0, 0))
    assert frame["rank"].tolist() == [1, 2, 3]
    # ranks of the first: 3 1 3 2, of the second: 1 1 3 2
    np.testing.assert_allclose(
        frame["attention"], [(0.2 + 0.3) / 2, (0.4 + 0.3) / 2, (0.2 + 0.1) / 2], rtol=1e-6
    )
    np.testing.assert_allclose(frame["attention_se"], [0.05, 0.05, 0.05], rtol=1e-5)
    with pytest.raises(ValueError, match="1 layers of 1 heads"):
        rare(attention, counts).by_rank((0, 1))


def test_the_null_band_holds_a_head_that_ignores_rarity_and_not_one_that_seeks_it() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 10**6, (60, 20), generator=generator)
    ignores = torch.rand(60, 20, generator=generator)
    seeks = 1.0 / (1 + counts.argsort(-1).argsort(-1))
    attention = rare(torch.stack([ignores, seeks], 1)[:, None], counts)
    blind, keen = (attention.by_rank((0, head)) for head in (0, 1))
    inside = blind["attention"].between(blind["null_low"], blind["null_high"])
    assert inside.mean() >= 0.8  # 95 % expected of 20 ranks
    assert keen["attention"][0] > 2 * keen["null_high"][0]
    assert keen["attention"][10] < keen["null_low"][10]
    figure = attention.figure(head=(0, 1))
    assert figure.data[0].name == "ranks shuffled within paragraphs"
    assert list(figure.data[-1].y) == keen["attention"].tolist()
    assert attention.figure().layout.shapes == ()  # tau 0 with a null of 0: nothing is framed


def test_text_of_a_result_is_escaped_in_notebooks() -> None:
    scores = ScoreMap("<img src=x>", "<b>", torch.zeros(1, 30), PROVENANCE)
    html = scores._repr_html_()
    assert "<img" not in html
    assert "<b>" not in html
    assert "The first 20 of 30 rows" in html


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
