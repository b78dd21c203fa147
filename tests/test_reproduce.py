"""The reproduction of the paper: numbers by another route, reasons, and going on where it was."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

import memcircuits as mc
from memcircuits.evidence.rare_tokens import RareTokenAttention
from tests.helpers import models as zoo

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import reproduce_paper as script
from reproduction import attention, statistics

QUICK = ("sets", "duplication", "perturbation", "gradients", "contrast", "ablation")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model in a folder, six paragraphs that it recites, six that it does not."""
    folder = tmp_path_factory.mktemp("files")
    zoo.shaken(zoo.hf_model("gpt_neo")).save_pretrained(folder / "tiny")
    zoo.tokenizer().save_pretrained(folder / "tiny")
    model = mc.load_model(folder / "tiny")
    recited = zoo.reciting(model, n=6, n_prefix=50, n_continuation=50)
    torch.save(recited.ids, folder / "recited.pt")
    torch.save(zoo.random_ids(6, 100, seed=3), folder / "others.pt")
    return folder


def run(files, out, *more, only=QUICK):
    options = ["--model", files / "tiny", "--paragraphs", files / "recited.pt", "--out", out]
    options += ["--controls", files / "others.pt", "--min-unique", "0", "--only", *only, *more]
    return json.loads(script.main([*map(str, options)]).read_text())


def rows(result, experiment):
    return [row for row in result["rows"] if row["experiment"] == experiment]


@pytest.fixture(scope="module")
def result(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return run(files, out), out


def test_numbers_are_those_of_the_library(result, files):
    data, _ = result
    model = mc.load_model(files / "tiny", fold_ln=True)
    recited = mc.Paragraphs.read(files / "recited.pt", model)
    drops = mc.perturb_prefix(model, recited).em_drop
    row = rows(data, "Prefix perturbation")[0]
    assert row["ours"] == pytest.approx(float(drops[:, 1:].mean()))
    assert row["paper"] == "12.19"
    assert row["low"] < row["ours"] < row["high"]
    gradients = mc.parameter_gradients(model, recited)
    share = next(r for r in data["rows"] if r["measure"].endswith("layers, EM 50"))
    assert share["ours"] == pytest.approx(100 * gradients.layer_share())
    raw = mc.parameter_gradients(mc.load_model(files / "tiny"), recited)
    (share,) = (r for r in data["rows"] if r["measure"].endswith("layers, EM 50, raw weights"))
    assert share["ours"] == pytest.approx(100 * raw.layer_share())
    assert abs(raw.layer_share() - gradients.layer_share()) > 1e-3
    without = mc.ablate_heads(model, recited).measure("em")
    row = rows(data, "Are these heads needed?")[0]
    head = mc.Head.parse(row["measure"].split()[3])
    assert row["ours"] == pytest.approx(-without[head])
    counts = {row["measure"]: row["ours"] for row in rows(data, "Sets of paragraphs")}
    assert counts["paragraphs with EM 50"] == counts["paragraphs with EM 0-10"] == 6


def test_what_cannot_be_had_says_why(result):
    data, out = result
    (row,) = rows(data, "Duplication")
    assert row["ours"] is None
    assert "mem_strings.csv" in row["note"]
    missing = [row for row in data["rows"] if row["ours"] is None]
    assert {row["note"] for row in missing} == {row["note"], "no such paragraph"}
    assert len(data["not_had"]) == len(missing) == 5
    page = (out / "reproduction.html").read_text()
    assert "not the paper" in page
    assert row["note"][:40] in page


def test_every_row_can_be_repeated(result):
    data, _ = result
    for row in data["rows"]:
        assert row["command"].startswith("python examples/reproduce_paper.py --model tiny")
        assert row["source"]
        assert row["seed"] == 0
        assert row["ours"] is None or row["n"] > 0
    assert data["settings"]["model"]["fingerprint"]


def test_it_goes_on_where_it_was(result, files, monkeypatch):
    data, out = result

    def refuse(study):
        raise AssertionError("measured again")

    kept = next((out / "parts").glob("*/perturbation.json"))
    for name, one in script.EXPERIMENTS.items():
        monkeypatch.setitem(script.EXPERIMENTS, name, dataclasses.replace(one, run=refuse))
    assert run(files, out)["rows"] == data["rows"]
    with pytest.raises(AssertionError, match="measured again"):
        run(files, out, "--seed", "1")
    kept.unlink()
    with pytest.raises(AssertionError, match="measured again"):
        run(files, out)


def test_sets_can_be_given(files, tmp_path):
    more = ("--as-given", "--paragraphs", files / "others.pt", "--controls", files / "recited.pt")
    data = run(files, tmp_path, *more, only=("sets",))
    assert [row["ours"] for row in data["rows"]] == [6, 0, 0, 6, 0]
    assert "taken as given" in data["rows"][0]["note"]
    with pytest.raises(mc.InputError, match="--as-given"):
        script.main(["--as-given"])


def test_the_jackknife_of_a_mean_is_students_interval():
    values = torch.tensor([1.0, 4.0, 2.0, 7.0, 3.0])
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    without = [[float(values[torch.arange(5) != i].mean())] for i in range(5)]
    (result,) = statistics.intervals([float(values.mean())], without)
    assert result == pytest.approx((float(values.mean()), low, high))


def test_fewer_than_five_have_no_interval():
    four = torch.tensor([1.0, 4.0, 2.0, 7.0])
    assert statistics.mean(four) == (3.5, None, None)
    assert statistics.intervals([1.0], [[0.5]] * 4) == [(1.0, None, None)]
    assert statistics.resampled(four[:, None], lambda rows: 2.0) == (2.0, None, None)
    assert statistics.mean(torch.tensor([1.0, 4.0, 2.0, 7.0, 3.0]))[1] is not None


def test_attention_summed_per_rank_falls_by_itself():
    """Even attention: whatever correlation there is comes from ranks that are seldom there."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (50, 20), generator=generator)
    rare = RareTokenAttention(
        name="",
        units="",
        values=torch.zeros(1, 1),
        provenance=None,
        attention=torch.full((50, 1, 1, 20), 0.05),
        counts=counts,
    )
    ours, null = attention.aggregated(rare, mc.Head(0, 0), seed=0)
    assert ours < -0.5
    assert math.isclose(ours, null, abs_tol=1e-6)
