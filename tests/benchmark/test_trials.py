"""Running, writing and reading trials, and (slow) that the ranking finds planted heads."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.benchmark import other_trials
from memcircuits.benchmark.leaderboard import (
    combinations,
    deletions,
    given_away,
    holders_accuracy,
    leaderboard,
)
from memcircuits.benchmark.metrics import METRICS, wilson
from memcircuits.benchmark.other_trials import holders_trial, null_trial
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.schemas import HoldersTrial, LocalizerScore, PlantedTrial
from memcircuits.benchmark.trial_kinds import RANKINGS
from memcircuits.benchmark.trials import read_trials, run_trials
from memcircuits.cli import app
from memcircuits.evidence.ablation import Ablation
from tests.helpers import models as zoo

pytestmark = pytest.mark.any_version

COUNTS = {"head": 1, "block": 2, "null": 10, "stability": 1}


@pytest.fixture(scope="module")
def pool(neo):
    recited = zoo.reciting(neo, n=12, n_continuation=3)
    ids = torch.cat([zoo.random_ids(64, 13, 2), recited.ids])
    return ParagraphPool.of(neo, mc.Paragraphs.from_tokens(ids, n_prefix=10))


@pytest.fixture(scope="module")
def folder(pool, tmp_path_factory):
    """A folder with trials of several kinds."""
    folder = tmp_path_factory.mktemp("bench")
    run_trials(pool, folder, counts=COUNTS, progress=False)
    return folder


def written_without_times(folder):
    """File name -> what the trial says, without how long it took."""
    trials = {}
    for path in sorted(folder.glob("*-*.json")):
        trial = json.loads(path.read_text())
        trial.pop("seconds")
        (trial.get("planted") or {}).pop("seconds", None)
        for result in trial.get("results", ()):
            result.pop("wall")
        trials[path.name] = trial
    return trials


def test_every_trial_is_a_file_with_all_localizers(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "block-0000.json", "block-0001.json", "head-0000.json", "null-0000.json", "run.json",
        "stability-0000.json",
    ]  # fmt: skip
    trials = read_trials(folder)
    done = [trial for trial in trials["head"] if not trial.failed]
    assert done
    for trial in done:
        results = {result.localizer: result for result in trial.results}
        assert set(RANKINGS) < set(results)
        assert {"oracle", "random", "exact-patching", "hard-concrete"} < set(results)
        assert results["oracle"].recall_at_1 == results["oracle"].auc == 1
        free = ("oracle", "random", "weight-norm", "norm-in-layer")
        assert all(result.forwards > 0 for n, result in results.items() if n not in free)
        assert len(results["random"].scores) == 16
    assert {result.unit for result in trials["block"][0].results} == {"block"}
    null = trials["null"][0]
    assert len(null.pairs) == 5  # no sources are known, and fewer than 20 are recited
    assert all(0 <= result.named <= null.runs == 10 for result in null.pairs.values())


def test_an_interrupted_run_continues_and_shards_make_the_whole(folder, pool, tmp_path):
    counts = {"block": 2, "null": 10}
    for index in (0, 1):
        run_trials(pool, tmp_path, counts=counts, shard=(index, 2), progress=False)
    kept = (tmp_path / "block-0000.json").stat().st_mtime_ns
    (tmp_path / "block-0001.json").unlink()
    run_trials(pool, tmp_path, counts=counts, progress=False)
    assert (tmp_path / "block-0000.json").stat().st_mtime_ns == kept
    expected, trials = written_without_times(folder), written_without_times(tmp_path)
    assert trials == {name: expected[name] for name in trials}
    assert len(trials) == 3


def test_some_localizers_score_as_among_all(folder, pool, tmp_path):
    names = ["oracle", "find_memorization_heads (screen)"]
    options = {"counts": {"head": 1}, "localizers": names, "progress": False}
    run_trials(pool, tmp_path, **options)
    scores, all_scores = (
        {r.localizer: r.scores for r in read_trials(path)["head"][0].results}
        for path in (tmp_path, folder)
    )
    assert scores == {name: all_scores[name] for name in names}
    write_leaderboard(read_trials(tmp_path), tmp_path)
    with pytest.raises(mc.InputError, match="trials of another run"):
        run_trials(pool, tmp_path, **options | {"localizers": None})
    with pytest.raises(mc.InputError, match="localizers: 'guess'"):
        run_trials(pool, tmp_path, **options | {"localizers": ["guess"]})


def test_the_folder_of_another_run_is_refused(folder, pool, neo, tmp_path):
    with pytest.raises(mc.InputError, match="trials of another run"):
        run_trials(pool, folder, counts=COUNTS, seed=1, progress=False)
    with pytest.raises(mc.InputError, match="counts"):
        run_trials(pool, tmp_path, counts={"tail": 1}, progress=False)
    with pytest.raises(mc.InputError, match="holds no trials"):
        read_trials(tmp_path)
    with pytest.raises(mc.InputError, match="at least 60"):
        ParagraphPool.of(neo, zoo.mixed(neo))


GOOD_SCORE = {
    "localizer": "random", "unit": "head", "recall_at_1": 0.0, "recall_at_k": 0.0, "mrr": 0.1,
    "auc": 0.5, "k": 1, "units": 2, "forwards": 0.0, "wall": 0.1, "scores": [0.1, 0.2],
}  # fmt: skip
GOOD = {
    "seed": 0,
    "where": ["L0H0"],
    "failed": None,
    "planted": {"steps": 1, "kl": 0.0, "seconds": 1},
    "results": [GOOD_SCORE],
    "deletions": [],
    "kind": "head",
    "seconds": 1.5,
}


def test_a_trial_that_an_earlier_version_wrote_is_read(tmp_path):
    (tmp_path / "head-0000.json").write_text(json.dumps(GOOD | {"a later key": 1}))
    (tmp_path / "holders-0000.json").write_text(
        '{"seed": 0, "em": [], "assigned": [], "planted": 1, "kind": "holders", "seconds": 2.0}'
    )
    trials = read_trials(tmp_path)
    assert trials["head"] == [PlantedTrial.model_validate(GOOD)]
    expected = HoldersTrial(seed=0, em=[], assigned=[], planted=1, kind="holders", seconds=2.0)
    assert trials["holders"] == [expected]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="truncated"),
        pytest.param("[]", id="no object"),
        pytest.param("[" * 100_000, id="nested too deeply"),
        pytest.param(json.dumps(GOOD | {"where": "L0H0"}), id="text in place of a list"),
        pytest.param(json.dumps(GOOD | {"seconds": "3"}), id="text in place of a number"),
        pytest.param(json.dumps({"where": ["L0H0"]}), id="key missing"),
        pytest.param(
            json.dumps(GOOD | {"results": [GOOD_SCORE | {"scores": None}]}), id="no scores"
        ),
        pytest.param(
            json.dumps(GOOD | {"results": [GOOD_SCORE | {"auc": 1.5}]}), id="impossible metric"
        ),
    ],
)
def test_a_damaged_trial_is_one_clear_error(tmp_path, content):
    (tmp_path / "head-0000.json").write_text(content)
    with pytest.raises(mc.InputError, match=r"^folder: head-0000.json; it is damaged; remove it$"):
        read_trials(tmp_path)


def test_the_leaderboard_is_the_mean_over_trials(folder):
    trials = read_trials(folder)
    frame = leaderboard(trials)
    row = frame[(frame.kind == "head") & (frame.localizer == "attribution")].iloc[0]
    done = [trial for trial in trials["head"] if not trial.failed]
    results = [r for trial in done for r in trial.results if r.localizer == "attribution"]
    assert row.trials == len(results)
    for metric in (*METRICS, "forwards"):
        mean = sum(getattr(result, metric) for result in results) / len(results)
        assert row[metric] == pytest.approx(mean)
    if len(results) == 1:  # one trial has no interval
        assert math.isnan(row.auc_low)
    else:
        assert row.auc_low <= row.auc <= row.auc_high
    ordered = frame[frame.kind == "head"].auc.tolist()
    assert ordered == sorted(ordered, reverse=True)


def test_the_leaderboard_is_written_as_table_text_page_and_figure(folder):
    paths = write_leaderboard(read_trials(folder), folder)
    assert [path.suffix for path in paths] == [".parquet", ".md", ".html", ".html"]
    assert "attribution" in paths[3].read_text()
    page = paths[1].read_text()
    assert "| attribution |" in page
    assert "own text against unknown text (20 against 20 drawn anew" in page
    assert "Agreement of rankings" in page
    for path in paths:
        path.unlink()


def planted_trial_with(scores):
    """A successful trial with these scores of the heads and a planted L0H0."""
    metrics = dict.fromkeys(METRICS, 0.0)
    results = [
        LocalizerScore(localizer=name, unit="head", forwards=1.0, scores=values, **metrics)
        for name, values in scores.items()
    ]
    return PlantedTrial(where=["L0H0"], failed=None, results=results)


def test_combined_evidence_is_chosen_on_other_trials():
    """Two localizers that err on different trials: their sum is right on all of them."""
    trials = []
    for i in range(8):
        truth, decoy, wrong = i % 5, (i + 2) % 5, "ab"[i // 2 % 2]
        scores = {name: [0.0] * 5 for name in ("a", "b", "oracle")}
        scores["oracle"][truth] = 1.0
        scores["a"][truth] = scores["b"][truth] = 2.0
        scores[wrong][decoy] = 3.0
        trials.append(planted_trial_with(scores))
    frame = combinations({"head": trials}).set_index("evidence")
    assert frame.loc["single", "recall@k"] == 0.5
    assert frame.loc["pair", "chosen"] == "a + b"
    assert frame.loc["pair", "recall@k"] == frame.loc["all", "recall@k"] == 1
    assert frame.loc["pair", "trials"] == 4
    assert combinations({"head": trials[:1]}).empty


def test_evidence_of_one_localizer_is_not_combined():
    trial = planted_trial_with({"a": [1.0, 0.0], "oracle": [1.0, 0.0]})
    assert combinations({"head": [trial] * 4}).evidence.tolist() == ["single", "all"]


@pytest.mark.parametrize("names", [("a", "b"), ("oracle", "random")])
def test_without_a_truth_or_a_localizer_nothing_is_combined(names):
    trial = planted_trial_with({name: [1.0, 0.0] for name in names})
    assert combinations({"head": [trial] * 4}).empty


def test_deleting_the_first_head_is_scored_by_what_the_others_keep_and_the_targets_lose():
    trials = []
    for where, targets in (("L0H0", 0.0), ("L0H0", 0.5), ("L0H1", 0.25)):
        score = {"localizer": "a", "targets": targets, "others": 1.0}
        trials.append(PlantedTrial.model_validate(GOOD | {"where": [where], "deletions": [score]}))
    row = deletions({"head": trials}).iloc[0]
    assert (row.targets, row.others, row.trials) == (0.25, 1.0, 3)  # two places of 0.25 each
    assert row.difference == row.difference_low == row.difference_high == 0.75
    assert math.isnan(deletions({"head": trials[:2]}).iloc[0].difference_low)  # one place
    assert deletions({}).empty


def test_a_kind_of_trial_that_is_not_there_is_refused_at_once(tmp_path):
    command = ["bench", "localize", "--kinds", "head,tail", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--kinds: 'tail'; choose one of block, decoys, head" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def rows_of(answers):
    """The leaderboard of trials with this place and this recall@1 each."""
    trials = []
    for where, recall in answers:
        metrics = dict.fromkeys(METRICS, recall)
        result = LocalizerScore(
            localizer="a", unit="head", forwards=1.0, scores=[0.1, 0.2], **metrics
        )
        trials.append(PlantedTrial(where=where, failed=None, results=[result]))
    return leaderboard({"two-heads": trials}).iloc[0]


def test_one_place_has_no_interval_and_none_is_printed(tmp_path):
    row = rows_of([(["L0H0", "L1H1"], 1.0), (["L1H1", "L0H0"], 0.0)])
    assert (row.trials, row.places, row.recall_at_1) == (2, 1, 0.5)
    assert row[[f"{metric}_{end}" for metric in METRICS for end in ("low", "high")]].isna().all()
    run = {"model": {"name": "tiny", "fingerprint": "0"}, "options": {"n": 1, "seed": 0}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "head-0000.json").write_text(json.dumps(GOOD))
    page = write_leaderboard(read_trials(tmp_path), tmp_path)[1].read_text()
    assert "| random | 0.00 | 0.00 | 0.10 | 0.50 | 0 |" in page


def test_intervals_of_trials_in_the_same_places_cover_only_by_places():
    """Five trials in each of 12 places; a place is always found or never, 70 % of them always."""
    rng = np.random.default_rng(0)
    covered = {"by places": 0, "by trials": 0}
    for _ in range(100):
        is_found = rng.random(12) < 0.7
        row = rows_of([([f"L0H{i}"], float(is_found[i])) for i in range(12) for _ in range(5)])
        assert (row.trials, row.places) == (60, 12)
        covered["by places"] += row.recall_at_1_low <= 0.7 <= row.recall_at_1_high
        low, high = wilson(row.recall_at_1, 60)
        covered["by trials"] += low <= 0.7 <= high
    assert covered["by places"] >= 90  # 95 expected, standard error 2.2
    assert covered["by trials"] < 75


def test_holders_are_among_the_heads_that_were_planted(pool, monkeypatch):
    monkeypatch.setattr(other_trials, "_N_HOLDERS", 3)  # six need minutes
    trial = holders_trial(pool, 0)
    assert trial.planted == len(trial.em) == 3
    recited = sum(tokens == 3 for tokens in trial.em)
    assert [a.method for a in trial.assigned] == ["exact"] * recited + ["screen"] * recited
    holders = {a.holder for a in trial.assigned}
    assert len(holders) == recited > 0
    accuracy = holders_accuracy({"holders": [trial]}).set_index("method")
    assert accuracy.loc["exact", "among_holders"] == 1  # chance: 1/16


def test_the_null_draws_two_sets_that_differ_in_loss(pool, monkeypatch):
    """Heads with an effect that follows the loss are named where losses differ, only there."""
    plain = Ablation.effects

    def as_the_loss(ablation, heads, **options):
        effects = plain(ablation, heads, **options)
        nll = mc.scan(ablation.adapter, ablation.paragraphs, progress=False).nll
        effects[..., 0] = -nll[:, None] + 0.01 * effects[..., 0]
        return effects

    monkeypatch.setattr(Ablation, "effects", as_the_loss)
    pairs = null_trial(pool, 100, 0).pairs
    alike = pairs["unknown text against unknown text"]
    assert alike.paragraphs == (len(pool.unknown),) * 2
    assert alike.per_side == 20
    assert alike.named <= 12  # 5 expected; more than 12 has a probability of 0.1 %
    differing = pairs["unknown text of lower against higher loss"]
    assert differing.nll[0] < differing.nll[1]
    assert differing.named == 100
    assert pairs["own text against unknown text"].named == 100


@pytest.mark.slow
def test_quick_benchmark_on_the_organism(tmp_path):
    """`memcircuits bench localize --quick`: the ranking beats chance by a wide margin.

    The costliest rivals are left out: the leaderboard of the docs has them.
    """
    localizers = "find_memorization_heads,attribution,weight-norm,random,oracle"
    options = ["--kinds", "head", "--localizers", localizers, "--out", str(tmp_path)]
    quick = ["bench", "localize", "--quick", *options, "--json", "--quiet"]
    result = CliRunner().invoke(app, quick)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["tables"]["leaderboard"]
    heads = {row["localizer"]: row for row in rows if row["kind"] == "head"}
    ranking = heads["find_memorization_heads"]
    assert ranking["trials"] >= 4
    assert ranking["recall_at_1"] >= 0.8  # 1/48 by chance
    assert ranking["auc"] >= 0.97
    assert heads["random"]["recall_at_1"] <= 0.4
    assert heads["oracle"]["recall_at_1"] == 1
    best = max(row["recall_at_1"] for name, row in heads.items() if name != "oracle")
    assert ranking["recall_at_1"] == best


def test_kinds_that_a_text_blind_method_solves_are_void(tmp_path):
    """Where the norm of its weights names the head, reading memory is not tested."""

    def trials_with(blind):
        metrics = {"weight-norm": blind, "attribution": 1.0}
        results = [
            LocalizerScore(
                localizer=name,
                unit="head",
                forwards=1.0,
                scores=[0.1, 0.2],
                **dict.fromkeys(METRICS, value),
            )
            for name, value in metrics.items()
        ]
        return [PlantedTrial(where=[f"L0H{i}"], failed=None, results=results) for i in range(8)]

    trials = {"head": trials_with(1.0), "head-same-norm": trials_with(0.0)}
    assert given_away(leaderboard(trials)) == {"head": "weight-norm"}
    run = {"model": {"name": "tiny", "fingerprint": "0"}, "options": {"n": 1, "seed": 0}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = write_leaderboard(trials, tmp_path)[1].read_text()
    assert "Written: head (8 trials, 8 places, void)" in page
    assert "Written: head-same-norm (8 trials, 8 places)" in page
    assert "head: these trials are void, because weight-norm" in page
