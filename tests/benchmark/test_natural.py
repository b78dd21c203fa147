"""The natural leaderboard: its metrics against scipy, its references, and files that resume."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import spearmanr

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.benchmark.natural import (
    natural_leaderboard,
    rank_correlations,
    recalls,
    write_natural_leaderboard,
)
from memcircuits.benchmark.natural_trials import (
    NaturalTrial,
    Twins,
    read_natural_trials,
    run_natural_trials,
    told_apart,
)
from tests.helpers import models as zoo

LOCALIZERS = ["gradient-l2", "zero-ablation", "random"]


@pytest.fixture(scope="module")
def twins():
    """Two tiny models, what each of them recites, and what neither does."""
    model, twin = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)
    recited = [zoo.reciting(m, n=6, seed=i) for i, m in enumerate((model, twin))]
    random = mc.Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=9), n_prefix=10)
    own, other, neither = (
        mc.Paragraphs(p.ids, 10, tuple(f"{name}-{i}" for i in range(6)))
        for name, p in zip(("own", "other", "neither"), (*recited, random), strict=True)
    )
    return Twins.of(model, twin, own + other + neither, noise=zoo.bridge("gpt_neo"))


@pytest.fixture(scope="module")
def folder(twins, tmp_path_factory):
    path = tmp_path_factory.mktemp("natural")
    options = {"n_trials": 2, "n_paragraphs": 2, "n_controls": 4, "localizers": LOCALIZERS}
    run_natural_trials(twins, path, **options)
    return path


def test_paragraphs_are_sorted_by_who_recites_them(twins):
    for paragraphs, name in ((twins.own, "own"), (twins.other, "other")):
        assert all(known.startswith(name) for known in paragraphs.names)
        assert len(paragraphs) >= 4
    n = twins.own.n_continuation
    assert (mc.scan(twins.model, twins.own).em == n).all()
    assert (mc.scan(twins.twin, twins.own).em <= 0.1 * n).all()
    assert all(mc.scan(m, twins.neither).em.max() <= 0.1 * n for m in (twins.model, twins.twin))


def test_paragraphs_are_sorted_by_their_role_where_it_is_known(twins):
    roles = ("both", "organism", "twin", "neither", "neither", "organism")
    paragraphs = mc.Paragraphs(twins.neither.ids[:4], 10, metadata={"role": roles[:4]})
    sorted_twins = Twins.of(twins.model, twins.twin, paragraphs)
    names = [getattr(sorted_twins, part).names for part in ("own", "other", "neither")]
    assert names == [("paragraph-0001",), ("paragraph-0002",), ("paragraph-0003",)]
    with pytest.raises(InputError, match="role organism"):
        Twins.of(twins.model, twins.twin, twins.neither)
    with pytest.raises(InputError, match="none of"):
        told_apart(twins.model, twins.twin, twins.neither)


def test_correlation_and_recall_equal_scipy_and_a_count_by_hand():
    pairs = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    expected = [spearmanr(*pair.numpy()).statistic for pair in pairs]
    torch.testing.assert_close(rank_correlations(pairs), torch.tensor(expected).float())
    assert math.isnan(rank_correlations(torch.stack([torch.ones(4), torch.randn(4)])[None])[0])
    pair = torch.tensor([[[5.0, 4, 3, 2, 1], [1.0, 9, 2, 8, 3]]])
    assert recalls(pair, 2).tolist() == [0.5]  # heads 0, 1 against 1, 3
    assert recalls(pair, 99).tolist() == [1.0]


def test_a_trial_holds_the_truth_and_every_score(folder, twins):
    trials = read_natural_trials(folder)
    assert [trial.direction for trial in trials] == ["model", "model", "twin", "twin"]
    first = trials[0]
    assert set(first.scores) == {
        *LOCALIZERS, "activations", "noise twin", "weight change", "weight norm",
        "ablation in the twin",
    }  # fmt: skip
    assert "noise twin" not in trials[2].scores
    named = [twins.own.names.index(name) for name in first.paragraphs]
    truth = mc.transplant(twins.model, twins.twin, twins.own[named], units=["head"])
    assert first.necessity == pytest.approx(truth.map().values.flatten().tolist(), abs=1e-6)
    assert first.total == pytest.approx(truth.total, abs=1e-5)
    assert set(first.scores["noise twin"]) == {0.0}  # a copy of the model
    ablation = mc.ablate_heads(twins.twin, twins.own[named]).values.flatten().tolist()
    assert first.scores["ablation in the twin"] == pytest.approx(ablation, abs=1e-6)
    assert len({name for trial in trials for name in trial.paragraphs}) == 8


def made_up(direction: str, seed: int) -> NaturalTrial:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(16, generator=generator)
    scores = {
        "good": (3 * truth).tolist(),
        "bad": (-truth).tolist(),
        "random": torch.randn(16, generator=generator).tolist(),
    }
    return NaturalTrial(
        direction=direction, paragraphs=["a"], total=1.0, necessity=truth.tolist(),
        sufficiency=truth.tolist(), scores=scores, forwards={"good": 2.0},
    )  # fmt: skip


def test_a_localizer_that_knows_the_truth_is_first():
    trials = [made_up("model", seed) for seed in range(5)] + [made_up("twin", 9)]
    frame = natural_leaderboard(trials, k=3)
    rows = frame[(frame["direction"] == "model") & (frame["truth"] == "necessity")]
    assert rows["localizer"].tolist()[0] in ("good", "other truth")
    assert rows["localizer"].tolist()[-1] == "bad"
    good = rows.set_index("localizer").loc["good"]
    assert (good["correlation"], good["correlation_low"], good["recall"]) == (1, 1, 1)
    assert good["forwards"] == 2.0
    chance = rows.set_index("localizer").loc["random"]
    assert chance["correlation_low"] < chance["correlation"] < chance["correlation_high"]
    assert frame.loc[frame["direction"] == "twin", "recall_low"].isna().all()  # one trial
    assert frame["reference"].sum() == 4  # the other truth


def test_finished_trials_are_not_run_again(folder, twins, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("memcircuits.benchmark.natural_trials.natural_trial", None)
    run_natural_trials(twins, folder, n_trials=2, n_paragraphs=2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_leaderboard_is_written_as_table_json_and_page(folder, tmp_path):
    written = write_natural_leaderboard(read_natural_trials(folder), tmp_path)
    assert sorted(path.name for path in written) == [
        "natural.html", "natural.json", "natural.md", "natural.parquet",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "natural.json").read_text())
    assert len(rows) == 2 * (1 + 8) + 2 * (1 + 7)
    assert "| noise twin * |" in (tmp_path / "natural.md").read_text()


def test_damaged_folders_and_wrong_options_are_refused(twins, tmp_path):
    with pytest.raises(InputError, match="no trials"):
        read_natural_trials(tmp_path)
    (tmp_path / "natural-model-0000.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        read_natural_trials(tmp_path)
    with pytest.raises(InputError, match="localizers"):
        run_natural_trials(twins, tmp_path, localizers=["guess"])
    with pytest.raises(InputError, match="n_paragraphs"):
        run_natural_trials(twins, tmp_path, n_paragraphs=0)
