"""Audits tell erased from hidden: truths that are known by construction, and bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.commands import audit as commands
from memcircuits.display.pages import Page
from memcircuits.editing.audits.measures import longest_runs
from memcircuits.editing.audits.page import audit_blocks
from memcircuits.editing.audits.result import EditAudit
from memcircuits.editing.audits.rounding import rounded
from memcircuits.editing.audits.verdict import Recited, shortfalls, verdict_of, ways_back
from memcircuits.editing.edit import Edit
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from tests.helpers import models as zoo
from tests.helpers.editing import CONTROL, UNSEEN, same_state, state_of

QUIET = {"progress": False}
QUICK = {"attacks": 1, "relearning_steps": 1, "progress": False}


@pytest.fixture(scope="module")
def planting():
    """A model, its twin, and three random texts planted in the MLP of layer 1."""
    model, twin = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo")
    texts = mc.Paragraphs.from_tokens(zoo.random_ids(3, 22, seed=3), n_prefix=10)
    planted = mc.plant(model, texts, where="L1.mlp", kl_budget=10.0, **QUIET)
    return model, twin, texts, planted


def scaled(planted: Edit, model, factor: float) -> Edit:
    """The planted change times a factor, as an edit of the planted model."""
    return Edit(
        indices=planted.indices,
        deltas={name: factor * delta for name, delta in planted.deltas.items()},
        norms=planted.norms,
        n_candidates=planted.n_candidates,
        provenance=Provenance.of(adapt(model), {}),
    )


@pytest.fixture(scope="module")
def undone(planting):
    """The audit of taking the planting back, with everything that can be measured."""
    model, twin, texts, planted = planting
    with planted.apply(model):
        undo = scaled(planted, model, -1.0)
        return mc.audit_edit(
            model, undo, texts, UNSEEN, twin, others=CONTROL, heldout=UNSEEN, truth=planted, **QUICK
        )


def test_undoing_a_plant_is_erased(undone):
    assert undone.verdict == "erased to the reference within noise"
    assert undone.depth[0] == pytest.approx(1, abs=1e-3)
    assert undone.remembered[0] == pytest.approx(0, abs=1e-3)
    assert undone.ways_back == ()
    # Edited model and twin have the same weights: they agree in every measure and every curve.
    for name, samples in undone.samples.items():
        torch.testing.assert_close(samples[1], samples[2], atol=1e-3, rtol=1e-3, msg=name)
    for curve in undone.relearning.values():
        assert torch.equal(curve[1], curve[2])
    assert (undone.layers_frame()["depth"][1:] > 0.99).all()  # the change is in layer 1
    assert undone.weights_auc > 0.95


def test_no_edit_does_not_touch(planting):
    model, twin, texts, planted = planting
    with planted.apply(model):
        nothing = mc.audit_edit(model, scaled(planted, model, 0.0), texts, UNSEEN, twin, **QUICK)
    assert nothing.verdict == "not touched"
    assert nothing.depth[0] == pytest.approx(0, abs=1e-6)
    assert nothing.remembered[0] == pytest.approx(1, abs=1e-6)
    assert float(nothing.harm["control/kl"].abs().max()) < 1e-6


def test_depth_is_that_of_plain_pytorch(planting):
    model, twin, texts, planted = planting
    with planted.apply(model):
        half = scaled(planted, model, -0.5)
        audit = mc.audit_edit(model, half, texts, UNSEEN, twin, **QUICK | {"relearning_steps": 0})
        log_p = [_log_probs(twin, texts), _log_probs(model, texts)]
        with half.apply(model):
            log_p.append(_log_probs(model, texts))
    reference, unedited, edited = log_p
    kl = [(reference.exp() * (reference - q)).sum(-1).mean() for q in (edited, unedited)]
    assert audit.depth[0] == pytest.approx(1 - float(kl[0] / kl[1]), abs=1e-4)
    assert 0 < audit.depth[0] < 1
    assert audit.verdict in ("hidden", "weakened")


def _log_probs(model, texts):
    with torch.no_grad():
        logits = model(texts.ids, return_type="logits")[:, texts.n_prefix - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("n", [2, 12, 50])
@pytest.mark.parametrize("depth", [0.1, 0.6, 1.0])
def test_a_change_of_the_first_token_alone_is_hidden(n, depth):
    # All tokens but the first are greedy: the run from the second token on stays.
    correct = torch.ones(1, n, dtype=torch.bool)
    correct[:, 0] = False
    run = float(longest_runs(correct))
    assert run == n - 1
    recited = {
        "em": Recited(edited=0, reference=0, unedited=n),
        "longest_run": Recited(edited=run, reference=0, unedited=n),
    }
    verdict = verdict_of(
        recited, (depth, math.nan), (1 - depth, math.nan), moved=0.5, same_em=False
    )
    assert verdict == "hidden"


def test_what_keeps_an_edit_from_erased_is_named():
    """An edit is erased exactly where nothing is named; bounds count where there are some."""
    recited = {
        "em": Recited(edited=0, reference=0, unedited=50),
        "em_cut": Recited(edited=10, reference=1, unedited=50),
    }
    assert shortfalls(recited, (0.67, math.nan), (0.185, math.nan)) == (
        "the depth is 0.67 (at least 0.8)",
        "18.5 % of the remembered bits are left (at most 10 %)",
        "em_cut brings back 9.0 tokens more than the reference recites (at most 2)",
    )
    del recited["em_cut"]
    assert shortfalls(recited, (0.85, 0.6), (0.05, 0.12)) == (
        "the depth is 0.85, and its interval begins at 0.60 (at least 0.8)",
        "5.0 % of the remembered bits are left, and the interval ends at 12.0 % (at most 10 %)",
    )
    for judged in [((0.8, math.nan), (0.1, math.nan)), ((0.79, math.nan), (0.1, math.nan))]:
        verdict = verdict_of(recited, *judged, moved=0.5, same_em=False)
        assert (verdict == "weakened") == bool(shortfalls(recited, *judged))


def test_attacks_that_show_nothing_are_named(undone):
    """What does not bring the text out of the unedited model is no evidence for an edit."""
    assert not any("Not erased" in each for each in undone.reading)
    weak = undone.samples["em_cut"].clone()
    weak[0] = 0
    audit = dataclasses.replace(undone, samples={**undone.samples, "em_cut": weak})
    said = next(each for each in audit.reading if each.startswith("No evidence"))
    assert "em_cut" in said
    assert "em_attacked" not in said
    assert said in Page("Audit", audit_blocks(audit, zoo.bridge("gpt_neo"))).render()


def test_what_the_own_prefix_still_brings_is_no_way_back():
    recited = {
        "em": Recited(edited=40, reference=0, unedited=50),
        "em_cut": Recited(edited=45, reference=0, unedited=50),
    }
    arguments = (recited, (0.5, math.nan), (0.5, math.nan))
    assert verdict_of(*arguments, moved=0.5, same_em=False) == "still recited"
    assert ways_back(recited) == ("em_cut",)


def test_a_twin_that_recites_a_target_is_refused(planting, monkeypatch):
    """The command takes a stand-in where the twin is only the shipped model's own, and says so."""
    model, twin, texts, planted = planting
    with planted.apply(model), planted.apply(twin):
        undo = scaled(planted, model, -1.0)
        with pytest.raises(
            mc.InputError, match="twin: recites paragraph-0000 and 2 more; give a model"
        ):
            mc.audit_edit(model, undo, texts, UNSEEN, twin, **QUICK)
        monkeypatch.setattr(commands, "load_twin", lambda inputs, name: twin)
        reference, notes = commands._reference(None, None, texts)
        assert reference is None
        assert "twin recites paragraph-0000 as well" in notes[0]
        assert commands._reference(None, "given", texts) == (twin, ())
    assert commands._reference(None, None, texts) == (twin, ())


def test_a_text_that_rounding_brings_back_is_found(planting):
    model, twin, texts, planted = planting
    with planted.apply(model), rounded(adapt(model), 8):
        texts = texts[mc.scan(model, texts, **QUIET).is_memorized]
        assert len(texts)
        # The model's weights lie on the grid: changes below half a step are rounded away.
        edit = _below_half_a_step(model, texts)
        audit = mc.audit_edit(model, edit, texts, UNSEEN, twin, **QUICK)
    assert float(audit.samples["em"][1].mean()) < 6
    assert (audit.samples["em_int8"][1] == 12).all()
    assert "em_int8" in audit.ways_back
    assert audit.verdict == "hidden"


def _below_half_a_step(model, texts) -> Edit:
    """A change by the gradient's sign of each weight that is not the largest of its row."""
    adapter = adapt(model)
    weights = adapter.weights()
    parameters = [weight.parameter for weight in weights]
    with adapter.preserving_state(grad=parameters):
        loss = -score_continuation(adapter, texts).log_prob.mean()
        gradients = torch.autograd.grad(loss, parameters)
    indices, deltas = {}, {}
    for weight, gradient in zip(weights, gradients, strict=True):
        rows = weight.parameter.detach()
        largest = rows.abs().amax(-1, keepdim=True)
        change = 0.45 * largest / 127 * gradient.sign() * (rows.abs() < largest)
        name = f"{weight.layer}.{weight.component}"
        deltas[name] = weight.split(change).flatten().clone()
        indices[name] = torch.arange(len(deltas[name]))
    return Edit(
        indices=indices,
        deltas=deltas,
        norms={name: torch.ones(1) for name in indices},
        n_candidates=sum(map(len, indices.values())),
        provenance=Provenance.of(adapter, {}),
    )


def test_rounding_is_symmetric_and_taken_back(planting):
    model = planting[0]
    before = state_of(model)
    matrix = next(p for p in model.parameters() if p.ndim == 2).detach()
    original = matrix.double().clone()
    with rounded(adapt(model), 4):
        scale = original.abs().amax(-1, keepdim=True) / 7
        torch.testing.assert_close(matrix.double(), (original / scale).round() * scale)
    assert same_state(before, model.state_dict())


def test_runs_begin_anywhere():
    correct = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    assert longest_runs(correct).tolist() == [2, 5, 0]


def test_without_a_twin_a_stand_in_is_named(planting, tmp_path):
    model, _, texts, planted = planting
    before = state_of(model)
    with planted.apply(model):
        audit = mc.audit_edit(model, scaled(planted, model, -1.0), texts, UNSEEN, **QUICK)
    assert audit.reference == "stand-in"
    assert "stand-in" in str(audit)
    assert audit.samples["em_attacked"][2].isnan().all()
    assert "cannot be attacked" in audit.reading[-1]
    assert audit.layer_nll is None
    assert same_state(before, model.state_dict())
    again = EditAudit.load(audit.save(tmp_path / "audit.safetensors"))
    assert again.verdict == audit.verdict
    assert again.to_frame().equals(audit.to_frame())


def test_the_page_and_the_tables_hold_what_was_measured(undone):
    blocks = audit_blocks(undone, zoo.bridge("gpt_neo"))
    assert undone.verdict in Page("Audit", blocks).render()
    frame = undone.to_frame().set_index("measure")
    assert frame.loc["em", "unedited"] == 12
    assert frame.loc["em_attacked", "edited"] >= frame.loc["em", "edited"]
    assert set(undone.relearning_frame()["trained_on"]) == set(undone.relearning)
    assert {"control", "others", "heldout"} <= {k.partition("/")[0] for k in undone.harm}
    assert undone.figure() is not None


@pytest.mark.skipif(not zoo.has_hooked(), reason="transformer-lens 4 has no HookedTransformer")
def test_a_hooked_transformer_is_audited():
    model, twin = zoo.hooked("gpt_neo"), zoo.hooked("gpt_neo")
    texts = mc.Paragraphs.from_tokens(zoo.random_ids(2, 22, seed=3), n_prefix=10)
    planted = mc.plant(model, texts, where="L1.mlp", kl_budget=10.0, **QUIET)
    with planted.apply(model):
        undo = scaled(planted, model, -1.0)
        audit = mc.audit_edit(model, undo, texts, UNSEEN, twin, **QUICK)
    assert audit.verdict == "erased to the reference within noise"


def test_bad_input_is_named(planting):
    model, twin, texts, planted = planting
    with planted.apply(model):
        undo = scaled(planted, model, -1.0)
        for options, argument in (
            ({"twin": model}, "twin"),
            ({"attacks": 0}, "attacks"),
            ({"relearning_steps": -1}, "relearning_steps"),
        ):
            with pytest.raises(InputError, match=f"^{argument}:"):
                mc.audit_edit(model, undo, texts, UNSEEN, **QUICK | options)
        unknown = mc.Paragraphs.from_tokens(zoo.random_ids(2, 22, seed=8), n_prefix=10)
        with pytest.raises(InputError, match=r"^targets: not recited"):
            mc.audit_edit(model, undo, unknown, UNSEEN, twin, **QUICK)
    with pytest.raises(InputError, match=r"^model:"):  # the planted paragraphs are not there
        mc.audit_edit(model, undo, texts, UNSEEN, twin, **QUICK)
