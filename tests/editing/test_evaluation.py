"""Reports of edits, relearning and noise agree with scans by hand, and leave no trace."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.evaluation import evaluate_edit, extraction_probability
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.relearning import recovery_curve
from tests.helpers.editing import CONTROL, UNSEEN, same_state, state_of


def test_an_empty_edit_changes_no_measure(neo_edit):
    model, memorized, result = neo_edit
    nothing = dataclasses.replace(
        result, deltas={k: torch.zeros_like(v) for k, v in result.deltas.items()}
    )
    report = evaluate_edit(
        model, nothing, memorized, UNSEEN, heldout=UNSEEN, attacks=3, progress=False
    )
    for name, (before, after) in report.samples.items():
        if name == "control/kl":
            assert float(after.abs().max()) < 1e-6
        else:
            assert torch.equal(before, after), name
    assert report.mean("control/em") == (12.0, 12.0)
    assert report.mean("memorized/em") == (12.0, 12.0)


def test_the_report_agrees_with_scans_by_hand(neo_edit, tmp_path):
    model, memorized, result = neo_edit
    report = evaluate_edit(
        model,
        result,
        memorized,
        UNSEEN,
        heldout=UNSEEN,
        others=memorized,
        attacks=5,
        progress=False,
    )
    em, attacked = (report.samples[f"memorized/{name}"] for name in ("em", "em_attacked"))
    assert (attacked >= em).all()
    assert torch.equal(report.samples["others/em"], em)
    with result.apply(model):
        scan = mc.scan(model, memorized, progress=False)
        text = mc.scan(model, mc.Paragraphs(UNSEEN.ids, 1), progress=False)
    assert report.mean("memorized/em")[1] == pytest.approx(float(scan.em.float().mean()))
    assert report.mean("memorized/bits")[1] == pytest.approx(float(scan.bits.mean()), rel=1e-5)
    frame = report.to_frame().set_index(["set", "measure"])
    perplexity = frame.loc[("heldout", "perplexity"), "after"]
    assert perplexity == pytest.approx(float(text.nll.mean().exp()), rel=1e-4)
    assert (frame["ci_low"] <= frame["change"] + 1e-6).all()
    assert (frame["change"] <= frame["ci_high"] + 1e-6).all()
    again = type(report).load(report.save(tmp_path / "report.safetensors"))
    assert again.to_frame().equals(report.to_frame())


def test_extraction_probability_by_hand():
    p = torch.tensor([0.5, 1.0, 0.0])
    result = extraction_probability(p.log(), 2)
    assert result.tolist() == pytest.approx([0.75, 1.0, 0.0])


def test_relearning_brings_it_back_and_leaves_no_trace(neo_edit):
    model, memorized, result = neo_edit
    before = state_of(model)
    curve = recovery_curve(
        model,
        result,
        memorized[2:],
        memorized[:2],
        steps=4,
        learning_rate=1e-4,
        every=2,
        progress=False,
    )
    assert same_state(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    assert curve.em.shape == (2, 3, 2)
    assert (curve.em[1, 0] == 12).all()
    assert (curve.em[0, 0] < 2).all()
    assert curve.steps.tolist() == [0, 2, 4]
    assert curve.steps_to(0) == 0
    frame = curve.to_frame()
    assert len(frame) == 6
    with pytest.raises(InputError, match=r"^trained:"):
        recovery_curve(model, result, memorized, memorized[:1], progress=False)


def test_noise_of_size_zero_is_no_noise_and_large_noise_ends_the_recitation(neo_edit):
    model, memorized, _ = neo_edit
    before = state_of(model)
    noise = weight_noise(
        model, memorized, CONTROL, sizes=(0.0, 0.3, 3.0), fraction=0.05, draws=2, progress=False
    )
    assert same_state(before, model.state_dict())
    assert (noise.em["memorized"][0] == 12).all()
    control = mc.scan(model, CONTROL, progress=False).nll
    torch.testing.assert_close(noise.nll["control"][0], control.expand(2, -1))
    assert float(noise.em["memorized"][2].mean()) < 6
    frame = noise.to_frame()
    assert list(frame["set"].unique()) == ["memorized", "control"]
    assert len(frame) == 6
    everywhere = weight_noise(
        model, memorized, CONTROL, sizes=(0.0,), mask="all", draws=1, progress=False
    )
    assert everywhere.n_weights == everywhere.n_candidates


def test_negative_noise_is_refused(neo_edit):
    model, memorized, _ = neo_edit
    with pytest.raises(InputError, match=r"^sizes:"):
        weight_noise(model, memorized, CONTROL, sizes=(-1.0,))
