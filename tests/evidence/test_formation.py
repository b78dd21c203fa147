"""Formation: every number is that of a scan, a sweep or numpy at the same checkpoint."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.evidence.formation_results import Formation
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def run():
    """Three "checkpoints", paragraphs that the last one recites, controls, a twin."""
    models = {7: zoo.bridge("gpt_neo", seed=2), 3: zoo.bridge("gpt_neo", seed=1)}
    models[20] = zoo.bridge("gpt_neo")
    recited = zoo.reciting(models[20], n=6)
    doses = (1, 1, 1, 8, 8, 8)
    paragraphs = mc.Paragraphs(recited.ids, 10, metadata={"repetitions": doses})
    control = mc.Paragraphs.from_tokens(zoo.random_ids(5, 22, seed=8), n_prefix=10)
    twin = zoo.bridge("gpt_neo", seed=4)
    result = mc.formation(models, paragraphs, twins=twin, control=control, max_paragraphs=4)
    return models, paragraphs, control, twin, result


def test_every_step_holds_what_a_scan_of_its_model_says(run):
    models, paragraphs, control, twin, result = run
    assert result.steps == (3, 7, 20)
    for i, step in enumerate(result.steps):
        own = mc.scan(models[step], paragraphs)
        assert torch.equal(result.em[i], own.em)
        assert torch.equal(result.nll[i], own.nll)
        assert torch.equal(result.control_nll[i], mc.scan(models[step], control).nll)
        bits = mc.counterfactual(models[step], twin, paragraphs).remembered.mean(-1)
        torch.testing.assert_close(result.remembered[i], bits, atol=1e-5, rtol=0)
    assert result.em[-1].tolist() == [12] * 6


def test_heads_are_those_of_ablation_and_transplant(run):
    models, paragraphs, _, twin, result = run
    chosen = paragraphs[list(result.measured)]
    assert len(chosen) == 4
    ablation = mc.ablate_heads(models[7], chosen)
    assert torch.equal(result.ablation[1], ablation.samples["nll"])
    truth = mc.transplant(models[7], twin, chosen, units=["head"]).map()
    assert torch.equal(result.necessity[1], truth.samples["necessity"])
    row = result.agreement().iloc[1]
    expected = spearmanr(ablation.values.flatten(), truth.values.flatten()).statistic
    assert row["ranking_truth"] == pytest.approx(expected)
    assert result.agreement()["truth_last"].iloc[-1] == pytest.approx(1)
    frame = result.head_frame()
    dose = frame[(frame["set"] == 8) & (frame["step"] == 7) & (frame["layer"] == 2)]
    rows = [i for i, row in enumerate(result.measured) if row >= 3]
    assert dose["n"].tolist() == [len(rows)] * 4
    mean = result.necessity[1, rows, 2].mean(0)
    assert dose["necessity"].tolist() == pytest.approx(mean.tolist())


def test_the_effect_is_the_difference_in_differences(run):
    models, paragraphs, control, _, result = run
    nll = {
        step: [mc.scan(m, p).nll.numpy() for p in (paragraphs, control)]
        for step, m in models.items()
    }
    frame = result.to_frame().set_index(["set", "step"])
    for dose, rows in ((1, slice(0, 3)), (8, slice(3, 6))):
        for step in result.steps:
            treated = nll[3][0][rows] - nll[step][0][rows]
            untreated = nll[3][1] - nll[step][1]
            expected = treated.mean() - untreated.mean()
            row = frame.loc[dose, step]
            assert row["effect"] == pytest.approx(expected, abs=1e-5)
            assert row["effect_low"] <= row["effect"] <= row["effect_high"]
            # Against resampling written in numpy: three treated and five untreated paragraphs.
            generator = np.random.default_rng(0)
            draws = [
                generator.choice(treated, 3).mean() - generator.choice(untreated, 5).mean()
                for _ in range(2000)
            ]
            spread = float(np.std(draws))
            assert row["effect_low"] == pytest.approx(np.quantile(draws, 0.025), abs=spread / 2)
    assert frame.loc[1, 3]["effect"] == 0


def test_copies_count_once(run):
    models, paragraphs, control, _, _ = run
    rows = [0, 1, 2, 2, 2, 2]
    models = {3: models[3], 7: models[7]}
    once = mc.formation(models, paragraphs[[0, 1, 2]], control=control, max_paragraphs=3)
    copies = mc.formation(models, paragraphs[rows], control=control, max_paragraphs=3)
    assert copies.measured[:2] == (0, 1)  # a second copy is drawn only when every text is
    assert "6 given paragraphs are 3 independent groups" in copies.notes[0]
    frames = [result.to_frame().drop(columns="n") for result in (once, copies)]
    pd.testing.assert_frame_equal(*frames)


def test_one_model_is_in_memory_at_a_time():
    alive: list[weakref.ref] = []
    most = []

    def load(seed):
        def loaded():
            gc.collect()
            most.append(sum(reference() is not None for reference in alive))
            model = zoo.bridge("gpt2", seed=seed)
            alive.append(weakref.ref(model))
            return model

        return loaded

    ids = zoo.random_ids(2, 22)
    paragraphs = mc.Paragraphs.from_tokens(ids, n_prefix=10)
    result = mc.formation([load(0), load(1), load(2)], paragraphs, max_paragraphs=0)
    assert result.steps == (0, 1, 2)
    assert max(most) <= 1
    assert result.ablation.numel() == 0
    assert result.to_frame().columns.tolist() == [
        "step",
        "set",
        "n",
        "n_groups",
        "em",
        "nll",
        "nll_low",
        "nll_high",
    ]


def test_checkpoints_are_also_folders(tmp_path, run):
    _, paragraphs, *_ = run
    folders = [zoo.save("gpt_neo", tmp_path / str(seed), seed=seed) for seed in (1, 0)]
    twins = [folders[1], str(folders[0])]
    result = mc.formation({10: folders[0], 20: folders[1]}, paragraphs[:2], twins=twins)
    assert result.em[1].tolist() == [12, 12]
    assert torch.equal(result.twin_nll, result.nll.flip(0))
    assert [entry["step"] for entry in result.provenance.options["models"]] == [10, 20]
    assert str(tmp_path) not in str(result.provenance)


def test_figure_and_file(run, tmp_path):
    *_, result = run
    figure = result.figure()
    assert {trace.name for trace in figure.data if trace.mode == "lines+markers"} == {"1", "8"}
    loaded = Formation.load(result.save(tmp_path / "result"))
    assert loaded.to_frame().equals(result.to_frame())
    assert "3 checkpoints" in str(loaded)
    one = result.to_frame(by="repetitions")
    assert one["set"].unique().tolist() == [1, 8]
    with pytest.raises(InputError, match="by"):
        result.to_frame(by="x")


def test_unusable_checkpoints_are_refused(run):
    models, paragraphs, _, twin, _ = run
    with pytest.raises(InputError, match="models"):
        mc.formation([], paragraphs)
    with pytest.raises(InputError, match="models"):
        mc.formation("organism", paragraphs)
    with pytest.raises(InputError, match="step"):
        mc.formation({-1: twin}, paragraphs)
    with pytest.raises(InputError, match="models: tiny-gpt2"):
        mc.formation([twin, zoo.bridge("gpt2")], paragraphs, max_paragraphs=0)
    with pytest.raises(InputError, match="twins"):
        mc.formation(models, paragraphs, twins={3: twin}, max_paragraphs=0)


def test_constant_maps_have_no_rank_correlation(run):
    models, paragraphs, *_ = run
    result = mc.formation([models[3]], paragraphs[:2], twins=models[3], max_paragraphs=1)
    assert math.isnan(result.agreement()["ranking_truth"][0])
