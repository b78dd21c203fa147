"""The benchmark of localizers: its arithmetic, its files, and (slow) that its winner wins."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.benchmark import trials as bench
from memcircuits.cli import app
from tests.helpers import models as zoo

COUNTS = {"head": 1, "block": 2, "null": 10, "stability": 1}


def pool_of(model):
    ids = torch.cat([zoo.random_ids(64, 13, 2), zoo.reciting(model, n=12, n_continuation=3).ids])
    return bench.ParagraphPool.of(model, mc.Paragraphs.from_tokens(ids, n_prefix=10))


@pytest.fixture(scope="module")
def run(neo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.run_trials(pool_of(neo), folder, counts=COUNTS, progress=False)
    return folder


def test_metrics_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, math.nan])
    truth = torch.tensor([False, False, True, False, True])
    found = bench.metrics(scores, truth)
    assert found["recall_at_1"] == 0
    assert found["recall_at_k"] == 0.5
    assert found["mrr"] == 0.5
    # Of 6 pairs: 0.5 beats 0.1, ties with 0.5, loses to 0.9; what is not a number is last.
    assert found["auc"] == pytest.approx(1.5 / 6)
    assert (found["k"], found["units"]) == (2, 5)
    perfect = bench.metrics(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True]))
    assert [perfect[m] for m in bench.METRICS] == [1, 1, 1, 1]
    with pytest.raises(mc.InputError, match="truth"):
        bench.metrics(scores, torch.zeros(5, dtype=torch.bool))


def test_every_trial_is_a_file_with_all_localizers(run, neo):
    names = sorted(path.name for path in run.iterdir())
    assert names == [
        "block-0000.json", "block-0001.json", "head-0000.json", "null-0000.json", "run.json",
        "stability-0000.json",
    ]  # fmt: skip
    trials = bench.read_trials(run)
    done = [t for t in trials["head"] if not t["failed"]]
    assert done
    for trial in done:
        rows = {row["localizer"]: row for row in trial["results"]}
        assert set(bench.RANKINGS) < set(rows)
        assert {"oracle", "random", "exact-patching", "hard-concrete"} < set(rows)
        assert rows["oracle"]["recall_at_1"] == rows["oracle"]["auc"] == 1
        assert all(row["forwards"] > 0 for n, row in rows.items() if n not in ("oracle", "random"))
        assert len(rows["random"]["scores"]) == 16
    assert {r["unit"] for r in trials["block"][0]["results"]} == {"block"}
    null = trials["null"][0]
    assert 0 <= null["unknown"]["named"] <= null["runs"] == 10


def test_an_interrupted_run_goes_on_and_shares_make_the_whole(run, neo, tmp_path):
    def content(folder):
        found = {}
        for path in sorted(folder.glob("*-*.json")):
            trial = json.loads(path.read_text())
            trial.pop("seconds")
            (trial.get("planted") or {}).pop("seconds", None)
            for row in trial.get("results", ()):
                row.pop("wall")
            found[path.name] = trial
        return found

    counts = {"block": 2, "null": 10}
    for index in (0, 1):
        bench.run_trials(pool_of(neo), tmp_path, counts=counts, shard=(index, 2), progress=False)
    kept = (tmp_path / "block-0000.json").stat().st_mtime_ns
    (tmp_path / "block-0001.json").unlink()
    bench.run_trials(pool_of(neo), tmp_path, counts=counts, progress=False)
    assert (tmp_path / "block-0000.json").stat().st_mtime_ns == kept
    expected = content(run)
    assert content(tmp_path) == {name: expected[name] for name in content(tmp_path)}
    assert len(content(tmp_path)) == 3


def test_some_localizers_alone_score_as_among_all(run, neo, tmp_path):
    names = ["oracle", "find_memorization_heads (screen)"]
    options = {"counts": {"head": 1}, "localizers": names, "progress": False}
    bench.run_trials(pool_of(neo), tmp_path, **options)
    rows, every = (
        {row["localizer"]: row["scores"] for row in bench.read_trials(folder)["head"][0]["results"]}
        for folder in (tmp_path, run)
    )
    assert rows == {name: every[name] for name in names}
    bench.write_leaderboard(bench.read_trials(tmp_path), tmp_path)
    with pytest.raises(mc.InputError, match="trials of another run"):
        bench.run_trials(pool_of(neo), tmp_path, **options | {"localizers": None})
    with pytest.raises(mc.InputError, match="localizers: 'guess'"):
        bench.run_trials(pool_of(neo), tmp_path, **options | {"localizers": ["guess"]})


def test_the_folder_of_another_run_is_refused(run, neo, tmp_path):
    with pytest.raises(mc.InputError, match="trials of another run"):
        bench.run_trials(pool_of(neo), run, counts=COUNTS, seed=1, progress=False)
    with pytest.raises(mc.InputError, match="counts"):
        bench.run_trials(pool_of(neo), tmp_path, counts={"tail": 1}, progress=False)
    with pytest.raises(mc.InputError, match="holds no trials"):
        bench.read_trials(tmp_path)
    (tmp_path / "head-0000.json").write_text("{")
    with pytest.raises(mc.InputError, match="damaged"):
        bench.read_trials(tmp_path)
    with pytest.raises(mc.InputError, match="at least 60"):
        bench.ParagraphPool.of(neo, zoo.mixed(neo))


def test_the_leaderboard_is_the_mean_over_trials(run):
    trials = bench.read_trials(run)
    frame = bench.leaderboard(trials)
    done = [t for t in trials["head"] if not t["failed"]]
    row = frame[(frame.kind == "head") & (frame.localizer == "attribution")].iloc[0]
    mine = [r for t in done for r in t["results"] if r["localizer"] == "attribution"]
    assert row.trials == len(mine)
    for metric in (*bench.METRICS, "forwards"):
        assert row[metric] == pytest.approx(sum(r[metric] for r in mine) / len(mine))
    assert row.auc_low <= row.auc <= row.auc_high
    ordered = frame[frame.kind == "head"].auc.tolist()
    assert ordered == sorted(ordered, reverse=True)
    paths = bench.write_leaderboard(trials, run)
    assert [path.suffix for path in paths] == [".parquet", ".md", ".html", ".html"]
    assert "attribution" in paths[3].read_text()
    page = paths[1].read_text()
    assert "| attribution |" in page
    assert "a head was called significant" in page
    assert "Agreement of rankings" in page
    for path in paths:
        path.unlink()


def test_combined_evidence_is_chosen_on_other_trials():
    """Two localizers that err on different trials: their sum is right on all of them."""

    def trial(i):
        truth, decoy = i % 5, (i + 2) % 5
        scores = {name: [0.0] * 5 for name in ("a", "b", "oracle")}
        scores["oracle"][truth] = 1.0
        for name in "ab":
            scores[name][truth] = 2.0
        scores["ab"[i // 2 % 2]][decoy] = 3.0
        results = [{"localizer": name, "scores": values} for name, values in scores.items()]
        return {"failed": None, "where": [f"L0H{truth}"], "results": results}

    frame = bench.combinations({"head": [trial(i) for i in range(8)]}).set_index("evidence")
    assert frame.loc["single", "recall@k"] == 0.5
    assert frame.loc["pair", "chosen"] == "a + b"
    assert frame.loc["pair", "recall@k"] == frame.loc["all", "recall@k"] == 1
    assert frame.loc["pair", "trials"] == 4
    assert bench.combinations({"head": [trial(0)]}).empty


def test_labels_that_carry_nothing_name_few_heads(neo):
    """The null: 60 random paragraphs, shuffled in halves; a head is named in few runs."""
    found = bench._null(pool_of(neo), 100, 0)["unknown"]
    assert found["per_side"] == 20
    assert found["named"] <= 12  # 5 expected; more than 12 has a probability of 0.1 %


def test_the_interval_of_a_proportion():
    low, high = bench.wilson(5, 100)
    assert 0 < low < 0.05 < high < 0.12


@pytest.mark.slow
def test_quick_benchmark_on_the_organism(tmp_path):
    """`memcircuits bench localize --quick`: the ranking beats chance by a wide margin."""
    result = CliRunner().invoke(
        app, ["bench", "localize", "--quick", "--out", str(tmp_path), "--json", "--quiet"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["leaderboard"]
    heads = {row["localizer"]: row for row in rows if row["kind"] == "head"}
    ours = heads["find_memorization_heads"]
    assert ours["trials"] >= 4
    assert ours["recall_at_1"] >= 0.8  # 1/48 by chance
    assert ours["auc"] >= 0.97
    assert heads["random"]["recall_at_1"] <= 0.4
    assert heads["oracle"]["recall_at_1"] == 1
    assert (
        max(row["recall_at_1"] for row in heads.values() if row["localizer"] != "oracle")
        == (ours["recall_at_1"])
    )
    holders = bench.holders_accuracy(bench.read_trials(tmp_path))
    assert holders.set_index("method").loc["exact", "among_holders"] >= 0.8  # chance 1/6
