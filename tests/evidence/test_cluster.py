"""Ablations shared by Ray workers are those of one process, also when a worker is killed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys

import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.evidence.cluster import Cluster, _tasks
from tests.helpers import models as zoo
from tests.helpers.local_ray import local_ray

pytestmark = pytest.mark.any_version

pytest.importorskip("ray", reason="the extra `ray` is not installed")

load = functools.partial(zoo.bridge, "gpt_neo")


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    with local_ray():
        yield


def rank(model, cluster, **options):
    return mc.find_memorization_components(
        model, zoo.mixed(model), draws=50, progress=False, cluster=cluster, **options
    )


def assert_same(shared, alone):
    torch.testing.assert_close(shared.score, alone.score, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(shared.ci, alone.ci, rtol=0, atol=1e-6, equal_nan=True)
    for name, values in alone.samples.items():
        torch.testing.assert_close(shared.samples[name], values, rtol=0, atol=1e-6, equal_nan=True)
    assert shared.notes == alone.notes
    assert shared.provenance.options == alone.provenance.options


@pytest.mark.parametrize(
    "options",
    [{"mode": "resample"}, {"mode": "mean", "units": ["head"]}, {"method": "screen"}],
    ids=["resample", "mean", "screen"],  # and zero below
)
def test_workers_find_what_one_process_finds(neo, options):
    assert_same(rank(neo, Cluster(load, workers=2), **options), rank(neo, None, **options))


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("parts", [1, 7, 1000])
@pytest.mark.parametrize("workers", [1, 2, 64])
def test_every_effect_is_measured_once(rows, parts, workers):
    times = torch.zeros(rows, parts)
    tasks = list(_tasks(rows, parts, workers))
    for of_rows, of_parts in tasks:
        times[of_rows, of_parts] += 1
    assert (times == 1).all()
    assert len(tasks) >= min(workers, rows * parts)


class Dying:
    """Makes a model whose process is killed in its 20th output, the first time."""

    def __init__(self, died):
        self.died = died

    def __call__(self):
        model = load()
        if not self.died.exists():
            self.left = itertools.count(-20)
            model.original_model.lm_head.register_forward_hook(self.count)
        return model

    def count(self, *_):
        if next(self.left) == 0:
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_replaced(neo, tmp_path):
    died = tmp_path / "died"
    shared = rank(neo, Cluster(Dying(died), workers=1))
    assert died.exists()
    assert_same(shared, rank(neo, None))


def test_a_worker_with_other_weights_is_an_error(neo):
    with pytest.raises(mc.InputError, match="a worker must load the weights"):
        rank(neo, Cluster(functools.partial(zoo.bridge, "gpt2"), workers=1))


def test_no_workers_are_too_few():
    with pytest.raises(mc.InputError, match="workers: 0"):
        Cluster(load, workers=0)


def test_without_ray_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(mc.InputError, match=r"ray; it is not installed; pip install"):
        Cluster(load)


def test_the_command(tmp_path):
    model = zoo.save("gpt_neo", tmp_path / "model")
    rows = [{"ids": ids} for ids in zoo.mixed(zoo.bridge("gpt_neo")).ids.tolist()]
    texts = tmp_path / "rows.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = ["heads", "--model", str(model), "--paragraphs", str(texts), "--quiet", "--json"]
    job += ["--n-prefix", "10", "--n-continuation", "12"]
    tables = []
    for name, options in {"here": [], "shared": ["--engine", "ray", "--workers", "2"]}.items():
        outcome = CliRunner().invoke(app, [*job, *options, "--out", str(tmp_path / name)])
        assert outcome.exit_code == 0, outcome.output
        tables.append(json.loads(outcome.stdout)["tables"]["heads"])
    for shared, alone in zip(*tables, strict=True):
        assert shared["head"] == alone["head"]
        assert shared["score"] == pytest.approx(alone["score"], abs=1e-6)


@pytest.mark.parametrize("option", [["--workers", "2"], ["--ray-address", "auto"]])
def test_options_of_ray_need_it(option):
    outcome = CliRunner().invoke(app, ["heads", *option])
    assert outcome.exit_code == 2
    assert f"{option[0]}: {option[1]}; it needs --engine ray" in outcome.stderr
