"""`info --plan`: every analysis has as many pieces as its text says, and nothing is changed."""

import json
from dataclasses import fields

import pytest
import torch
from typer.testing import CliRunner

from memcircuits.cli import app
from memcircuits.commands import cost_plan
from memcircuits.editing.recipe import DEEP
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import same_state, state_of

NAMES = [
    *("scan", "heads", "heads --units head,mlp", "heads --method screen"),
    *("gradients", "ablate", "perturb", "unlearn"),
]


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_every_analysis_of_every_architecture_is_planned(name):
    model = zoo.bridge(name)
    before = state_of(model)
    frame = cost_plan.plan(
        adapt(model), n_prefix=10, n_continuation=12, n_paragraphs=50, n_measured=5
    )
    assert list(frame["analysis"]) == NAMES
    assert (frame[["passes", "seconds", "mib"]] > 0).all(axis=None)
    assert same_state(before, model.state_dict())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def seconds_with(neo, **given):
    """Seconds of the analyses if only these pieces took any."""
    zeros = dict.fromkeys((field.name for field in fields(cost_plan.Pieces)), 0.0)
    pieces = cost_plan.Pieces(**zeros | given)
    return cost_plan._seconds_of_analyses(adapt(neo), pieces, (10, 12), 50, 20)


def test_pieces_are_counted(neo):
    adapter = adapt(neo)
    n_layers, n_heads, pilot = adapter.n_layers, adapter.n_layers * adapter.n_heads, 2 * 16
    heads = seconds_with(neo, head=1.0)
    assert heads["heads"] == heads["ablate"] == 40 * n_heads
    assert heads["scan"] == heads["gradients"] == heads["unlearn"] == 0
    assert heads["heads --method screen"] == 40 * min(n_heads, 24)
    mlps = seconds_with(neo, mlp=1.0)
    assert mlps["heads"] == pilot * n_layers
    assert mlps["heads --units head,mlp"] == 40 * n_layers
    forward = seconds_with(neo, forward=1.0)
    assert forward["scan"] == 50
    assert forward["ablate"] == 50 + 40
    assert forward["heads"] == 50 + 40 + pilot
    assert seconds_with(neo, replacement=1.0)["perturb"] == 40 * 10
    assert seconds_with(neo, gradient=1.0)["gradients"] == 40
    assert seconds_with(neo, step=1.0)["unlearn"] == DEEP.steps


def test_eigendecompositions_cost_as_the_cube(neo, monkeypatch):
    monkeypatch.setattr(cost_plan, "_seconds", lambda work: 1.0)
    widths = [
        weight.values.shape[1]
        for weight in adapt(neo).weights()
        for _ in range(weight.values.shape[0])
    ]
    expected = sum((width / max(widths)) ** 3 for width in widths)
    assert cost_plan._seconds_of_roots(adapt(neo)) == pytest.approx(expected)


def test_the_command(tmp_path):
    folder = zoo.save("gpt_neo", tmp_path)
    job = ["info", str(folder), "--n-prefix", "10", "--n-continuation", "12", "--quiet", "--plan"]
    job += ["--plan-paragraphs", "50", "--max-paragraphs", "5"]
    shown = CliRunner().invoke(app, job)
    assert shown.exit_code == 0, shown.output
    assert "what analyses would cost" in shown.stdout
    assert "5 + 20 paragraphs" in shown.stdout
    answer = json.loads(CliRunner().invoke(app, [*job, "--json"]).stdout)
    assert [row["analysis"] for row in answer["tables"]["plan"]] == NAMES
    assert torch.tensor([row["seconds"] for row in answer["tables"]["plan"]]).isfinite().all()


def test_lengths_that_do_not_fit_are_refused(tmp_path):
    folder = zoo.save("gpt_neo", tmp_path)
    outcome = CliRunner().invoke(app, ["info", str(folder), "--plan", "--n-prefix", "5000"])
    assert outcome.exit_code == 2
    assert "tokens fit" in outcome.stderr


def test_paragraphs_without_a_plan_are_refused():
    outcome = CliRunner().invoke(app, ["info", "--plan-paragraphs", "50"])
    assert outcome.exit_code == 2
    assert "--plan-paragraphs: 50; it is for --plan" in outcome.stderr
