"""What the report measures beyond the ranking agrees with independent computations."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.display.pages import Explorer
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt
from memcircuits.report import head_details
from memcircuits.report import measurements as measurements_of_page
from memcircuits.report.component_rows import best_heads, named_rows
from memcircuits.report.explorer_section import explorer
from memcircuits.report.head_details import details_of
from memcircuits.report.measurements import take_measurements
from memcircuits.report.ranking_page import ranking_page
from memcircuits.report.robustness import other_choices
from memcircuits.report.sections import headline_numbers, score_map
from memcircuits.report.triggers_section import trigger_blocks
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def ranking(neo):
    return mc.find_memorization_heads(neo, zoo.mixed(neo, n=6), draws=200, progress=False)


@pytest.fixture(scope="module")
def measurements(neo, ranking):
    return take_measurements(ranking, neo, heads=3, triggers=0, progress=False)


def test_samples_are_the_effects_behind_the_evidence(ranking):
    for name in ("memorized", "control"):
        mean = ranking.samples[name].mean(0)
        torch.testing.assert_close(mean, ranking.evidence[f"ablation_{name}"])


def test_attention_kept_is_the_largest_of_each_query(neo, ranking, measurements):
    head = ranking.top(1)[0]
    view = mc.attention_view(neo, ranking.memorized[2], heads=[head])
    kept = measurements.details.on_paragraphs[str(head)][2]
    predicting = view.patterns[0, 9:21]  # 10 tokens of prefix, 12 of continuation
    weights, keys = predicting.topk(head_details.N_KEYS)
    torch.testing.assert_close(kept.weights, weights)
    assert torch.equal(kept.keys, keys)


def test_what_is_stored_is_what_was_measured(measurements, ranking):
    block = explorer(ranking, measurements)
    data = block.context()["data"]
    assert data["names"] == [str(head) for head in ranking.top(16)]
    assert data["firstQuery"] == 9
    one = measurements.details.on_paragraphs[data["names"][0]][0]
    stored = data["components"][0]["onParagraphs"][0]
    raw = np.frombuffer(base64.b64decode(stored["attention"]), "u1").reshape(2, 12, -1)
    assert (raw[0] == one.keys.numpy()).all()
    np.testing.assert_allclose(raw[1] / 250, one.weights, atol=0.0021)
    written = np.frombuffer(base64.b64decode(stored["writes"]), "i1") / 127 * stored["largest"]
    np.testing.assert_allclose(written, one.writes, atol=stored["largest"] / 200)
    assert data["components"][0]["estimates"][0][0] == "as ranked"


def test_other_heads_have_as_many_paragraphs_as_fit(neo, ranking, monkeypatch):
    monkeypatch.setattr(head_details, "BUDGET", 13 * 2 * 4 / 3 * 12 * 11)  # 2 of each of 13 heads
    best, names = best_heads(ranking, 3), named_rows(ranking)["component"].tolist()
    details = details_of(adapt(neo), ranking.memorized, names, best, progress=False)
    counts = {name: len(shown) for name, shown in details.on_paragraphs.items()}
    assert {counts[str(head)] for head in best} == {6}
    assert {n for name, n in counts.items() if name not in map(str, best)} == {2}


def test_the_first_choice_is_the_ranking_and_the_others_are_ablations(neo, ranking):
    heads = best_heads(ranking, 2)
    loss = mc.scan(neo, ranking.control, progress=False).nll
    first, *others = other_choices(ranking, adapt(neo), heads, loss, progress=False)
    unsaved = dataclasses.replace(ranking, samples={})
    again = other_choices(unsaved, adapt(neo), heads, loss, progress=False)
    for choice, measured in zip([first, *others], again, strict=True):
        torch.testing.assert_close(choice.score, measured.score, atol=1e-5, rtol=1e-4)
    for i, head in enumerate(heads):
        assert float(first.score[i]) == pytest.approx(float(ranking.score[head]), abs=1e-5)
        assert float(first.ci[0, i]) < float(first.score[i]) < float(first.ci[1, i])
    by_name = {choice.name: choice for choice in others}
    means = {
        name: Ablation(neo, paragraphs, mode="mean", reference=ranking.control)
        .effects(heads, progress=False)[..., 0]
        .mean(0)
        for name, paragraphs in {"memorized": ranking.memorized, "control": ranking.control}.items()
    }
    expected = means["memorized"] - means["control"]
    torch.testing.assert_close(by_name["mean ablation"].score, expected, atol=1e-5, rtol=1e-4)
    own = by_name["the model's own text as controls"]
    texts = greedy_continuations(neo, ranking.control, progress=False)
    assert own.control_loss == pytest.approx(float(mc.scan(neo, texts).nll.mean()), abs=1e-5)
    assert own.n_control == len(ranking.control)


def test_controls_are_described(measurements, ranking, neo):
    from memcircuits.report.checks_sections import control_table

    frame = control_table(measurements).frame.set_index("set")
    assert frame.loc["memorized", "em"] == 12
    scan = mc.scan(neo, ranking.control)
    assert frame.loc["controls", "nll"] == pytest.approx(float(scan.nll.mean()))
    assert frame.loc["controls", "EM above 2"] == int((scan.em > 2).sum())
    assert "trained on" not in frame  # nobody knows


def test_the_map_has_heads_and_mlps_apart(neo, ranking):
    only_heads = score_map(ranking)
    assert (only_heads.n_apart, only_heads.scale) == (0, "linear")
    assert torch.equal(only_heads.values, ranking.score)
    assert only_heads.cell_names[2][1] == "L2H1"
    both = mc.find_memorization_components(
        neo, zoo.mixed(neo, n=4), units=["head", "mlp"], draws=50, progress=False
    )
    block = score_map(both)
    assert (block.n_apart, block.scale) == (1, "square root")
    assert torch.equal(block.values, both.score[:, :5])
    assert [row[4] for row in block.cell_names] == ["L0.mlp", "L1.mlp", "L2.mlp", "L3.mlp"]
    page = ranking_page(both, neo, triggers=0, progress=False)
    data = next(b for b in page.blocks if isinstance(b, Explorer)).context()["data"]
    assert data["names"] == [str(part) for part in both.top_components(20)]
    mlp = data["components"][data["names"].index("L1.mlp")]
    assert mlp["topTokens"]
    assert not mlp["onParagraphs"]
    assert len(mlp["effects"]["memorized"]) == 4
    html = page.render()
    assert 'href="#L1.mlp"' in html
    assert 'id="L1.mlp"' in html


def test_nothing_is_run_twice_for_the_page(neo, ranking, monkeypatch):
    """Two scans, and one clean run of each set beside the runs without a head."""
    adapter, n_rows = adapt(neo), []
    scanned, recorded = measurements_of_page.scan, ResumableRun.__init__

    def scan(adapter, paragraphs, **options):
        n_rows.append(("scan", len(paragraphs)))
        return scanned(adapter, paragraphs, **options)

    def record(run, adapter, paragraphs, *arguments, **options):
        n_rows.append(("clean run", len(paragraphs)))
        recorded(run, adapter, paragraphs, *arguments, **options)

    monkeypatch.setattr(measurements_of_page, "scan", scan)
    monkeypatch.setattr(ResumableRun, "__init__", record)
    take_measurements(ranking, adapter.model, heads=3, triggers=0, progress=False)
    n_memorized, n_control = len(ranking.memorized), len(ranking.control)
    assert sorted(n_rows) == sorted(
        [("scan", n_memorized), ("scan", n_control), ("clean run", n_memorized)]
        + [("clean run", n_control)] * 2  # as they are, and the model's own text
    )


def test_a_mark_far_from_all_others_is_named_and_not_drawn(ranking):
    from memcircuits.report.checks_sections import effect_scatter

    drawn = effect_scatter(ranking)
    assert len(drawn.frame) == ranking.score.numel()
    assert "Beyond the frame" not in drawn.note
    far = {name: values.clone() for name, values in ranking.evidence.items()}
    for name, effect in (("ablation_control", 61.0), ("ablation_memorized", 95.0)):
        far[name][1, 2] = effect
    drawn = effect_scatter(dataclasses.replace(ranking, evidence=far))
    assert "L1H2" not in set(drawn.frame["component"])
    assert len(drawn.frame) == ranking.score.numel() - 1
    assert "Beyond the frame: L1H2 (61 on controls, 95 on memorized)." in drawn.note


def test_tokens_that_trigger_as_much_are_named_together(neo, ranking):
    """No token is called the trigger where others cost as much; the table puts ties by loss."""
    perturbation = mc.perturb_prefix(neo, ranking.memorized[:1], draws=1, progress=False)
    em = perturbation.baseline_em[:, None, None].expand_as(perturbation.em).clone()
    em[:, [2, 7]] = 0
    nll = perturbation.baseline_nll[:, None, None].expand_as(perturbation.nll).clone()
    nll[:, 7] += 1
    tied = dataclasses.replace(perturbation, em=em, nll=nll)
    texts = [[f"t{i}" for i in range(22)]]
    first, table = trigger_blocks(tied, texts)
    assert "the place of “t7” (token 7) or “t2” (token 2) 12 of 12 tokens are lost" in first.note
    assert table.frame["position"].tolist() == [7, 2]
    em[:] = 0
    every = trigger_blocks(dataclasses.replace(tied, em=em), texts)[0].note
    assert "or 5 more 12 of 12" in every


def test_tiles_say_how_many_were_measured(ranking):
    tiles = {number.label: number for number in headline_numbers(ranking).items}
    assert "measured" not in tiles["recited in full"].detail
    some = dataclasses.replace(ranking, counts={**ranking.counts, "memorized": 40})
    tile = {number.label: number for number in headline_numbers(some).items}["recited in full"]
    assert tile.value == "40"
    assert f"{len(ranking.memorized)} of them measured" in tile.detail
