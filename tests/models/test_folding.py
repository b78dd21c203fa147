"""`load_model(fold_ln=True)`: the same function in the paper's basis, or a reason why not."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.folding import fold_norms
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.variants import needs_hooked_transformer


def bridge(name, dtype=torch.float32):
    return as_bridge(zoo.shaken(zoo.hf_model(name)).to(dtype), zoo.tokenizer(), name=f"tiny-{name}")


def logits(model):
    adapter = adapt(model)
    with adapter.preserving_state():
        return adapter.forward(zoo.random_ids(2, 20))


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_logits_stay_and_norms_become_plain(name):
    model = bridge(name)
    expected, before = logits(model), adapt(model).weight(0, "W_Q").matrix.clone()
    fold_norms(model)
    assert adapt(model).basis == "folded"
    assert float((logits(model) - expected).abs().max()) < 1e-5
    assert not torch.allclose(adapt(model).weight(0, "W_Q").matrix, before, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama", "gemma2"])
def test_folding_is_an_identity_in_float64(name):
    """TransformerLens folds, and Gemma's norm computes, with `Tensor.float()`: here in double."""
    model = bridge(name, torch.float64)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        expected = logits(model)
        model.enable_compatibility_mode(disable_warnings=True, center_unembed=False)
        assert float((logits(model) - expected).abs().max()) < 1e-10


def test_weights_are_those_of_the_formula(tmp_path):
    """W_Q' = diag(w) W_Q, its columns' means taken out as LayerNorm takes out that of its input."""
    folder = tmp_path / "tiny"
    zoo.shaken(zoo.hf_model("gpt_neo")).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    raw, folded = mc.load_model(folder), mc.load_model(folder, fold_ln=True)
    block = raw.original_model.transformer.h[1]
    expected = block.ln_1.weight.detach()[:, None] * adapt(raw).weight(1, "W_Q").matrix
    expected -= expected.mean(1, keepdim=True)
    assert torch.allclose(adapt(folded).weight(1, "W_Q").matrix, expected, atol=1e-6)
    centred = adapt(folded).weight(1, "W_O").matrix.mean(-1)
    assert float(centred.abs().max()) < 1e-6
    assert mc.scan(folded, zoo.mixed(raw), progress=False).provenance.basis == "folded"


@needs_hooked_transformer
def test_gradients_are_those_of_hooked_transformer():
    """The paper's model class, with its default processing."""
    source = zoo.shaken(zoo.hf_model("gpt_neo"))
    hooked = zoo.hooked("gpt_neo", source, folded=True)
    folded = as_bridge(source, zoo.tokenizer(), name="tiny")
    fold_norms(folded)
    paragraphs = zoo.mixed(folded)
    ours, theirs = (mc.parameter_gradients(m, paragraphs, progress=False) for m in (folded, hooked))
    for component, values in theirs.values.items():
        torch.testing.assert_close(ours.values[component], values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["Nemotron", "Olmo2", "Phi"])
def test_what_cannot_be_folded_is_refused_in_one_line(name):
    model = as_bridge(zoo.other(name), zoo.tokenizer(), name=name)
    with pytest.raises(
        UnsupportedModel, match=rf"^fold_ln: {name} .*load it without fold_ln"
    ) as no:
        fold_norms(model)
    assert "\n" not in str(no.value)
