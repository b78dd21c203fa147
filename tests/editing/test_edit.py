"""An edit changes exactly what it says, can be taken back, saved, and fits one model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.edit import Edit
from memcircuits.editing.recipe import STOEHR_2024
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.editing import n_different, quick_edit, same_state, state_of

ARCHITECTURES = sorted(zoo.ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exactly_the_masked_weights_change_and_come_back(name):
    model = zoo.bridge(name)
    before = state_of(model)
    result = quick_edit(model, zoo.reciting(model), fraction=0.005)
    assert same_state(before, model.state_dict())
    total = sum(w.values.numel() for w in adapt(model).weights())
    assert result.n_candidates == total
    assert result.n_masked == round(0.005 * total)
    with result.apply(model) as edited:
        assert edited is model
        changes = {k: t - before[k] for k, t in model.state_dict().items()}
    assert same_state(before, model.state_dict())
    assert 0 < sum(int((c != 0).sum()) for c in changes.values()) == result.n_changed
    assert result.n_changed <= result.n_masked
    norm = sum(float(c.double().square().sum()) for c in changes.values()) ** 0.5
    assert result.norm == pytest.approx(norm, rel=1e-6)
    frame = result.to_frame()
    assert frame["changed"].sum() == result.n_changed
    assert (frame["norm"] ** 2).sum() ** 0.5 == pytest.approx(norm, rel=1e-5)


def test_hooked_transformers_are_edited_alike():
    if not zoo.has_hooked():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    model = matrix.model("gpt_neo", "HookedTransformer raw")
    bridge = matrix.model("gpt_neo", "Bridge raw")
    memorized = zoo.reciting(bridge)
    one, other = (quick_edit(m, memorized, recipe=STOEHR_2024) for m in (model, bridge))
    assert set(one.indices) == set(other.indices)
    for name, index in one.indices.items():
        assert len(set(index.tolist()) ^ set(other.indices[name].tolist())) <= 0.1 * len(index)
    with one.apply(model):
        result = mc.scan(model, memorized, progress=False).nll
    with other.apply(bridge):
        expected = mc.scan(bridge, memorized, progress=False).nll
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_models_come_back_too():
    model = as_bridge(zoo.hf_model("gpt_neo").bfloat16(), zoo.tokenizer(), name="tiny-half")
    before = state_of(model)
    result = quick_edit(model, zoo.reciting(model), fraction=0.01)
    with result.apply(model):
        changed = n_different(before, model.state_dict())
    assert changed == result.n_changed > 0
    assert same_state(before, model.state_dict())


def test_restored_after_an_exception(neo_edit):
    model, _, result = neo_edit
    before = state_of(model)
    with pytest.raises(RuntimeError, match="mine"), result.apply(model):
        raise RuntimeError("mine")
    assert same_state(before, model.state_dict())


def test_restored_after_an_interrupt_of_the_search(neo_edit, monkeypatch):
    model, memorized, _ = neo_edit
    before = state_of(model)
    changed = []
    step = torch.optim.Adam.step

    def interrupted(self, *args, **kwargs):
        changed.append(not same_state(before, model.state_dict()))
        if len(changed) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick_edit(model, memorized)
    assert changed == [False, True, True]  # it was in the middle of an edit
    assert same_state(before, model.state_dict())


def test_divergence_names_the_step_and_restores(neo_edit, monkeypatch):
    model, memorized, _ = neo_edit
    before = state_of(model)

    def diverge(adam):  # norms keep the loss of a tiny model finite at any learning rate
        for group in adam.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", diverge)
    with pytest.raises(InputError, match=r"learning_rate: .*not finite at step 1;"):
        quick_edit(model, memorized)
    assert same_state(before, model.state_dict())


def test_an_edit_fits_only_its_own_weights(neo_edit):
    model, _, result = neo_edit
    with pytest.raises(InputError, match="made for weights"), result.apply(zoo.bridge("gpt2")):
        pass
    other = zoo.bridge("gpt_neo", seed=1)
    with pytest.raises(InputError, match="made for weights"), result.apply(other):
        pass
    with (
        result.apply(model),
        pytest.raises(InputError, match="one edit at a time"),
        result.apply(model),
    ):
        pass


def test_save_and_load(neo_edit, tmp_path):
    model, _, result = neo_edit
    again = Edit.load(result.save(tmp_path / "edit.safetensors"))
    assert again.provenance == result.provenance
    assert again.to_frame().equals(result.to_frame())
    assert again.steps().equals(result.steps())
    with result.apply(model):
        expected = state_of(model)
    with again.apply(model):
        assert same_state(expected, model.state_dict())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "edit.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        Edit.load(damaged)


def test_deltas_must_be_finite(neo_edit):
    _, _, result = neo_edit
    deltas = {name: torch.full_like(delta, torch.nan) for name, delta in result.deltas.items()}
    with pytest.raises(InputError, match="not finite"):
        dataclasses.replace(result, deltas=deltas)
