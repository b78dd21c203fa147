"""Weights are views of what the model computes with, the same for every architecture."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.variants import EVERY_MODEL, model


@pytest.mark.parametrize(("name", "variant"), EVERY_MODEL)
def test_weights_are_views_that_the_model_computes_with(name, variant):
    """Zeroing one head of a component, or an MLP matrix, moves the logits; undoing it restores."""
    adapter = adapt(model(name, variant))
    ids = zoo.random_ids(1, 12)
    with adapter.preserving_state():
        clean = adapter.forward(ids)
        for layer in (0, adapter.n_layers - 1):
            for component in adapter.components:
                values = adapter.weight(layer, component).values[-1]
                kept = values.clone()
                values.zero_()
                moved = adapter.forward(ids)
                values.copy_(kept)
                assert (moved - clean).abs().max() > 1e-6, (layer, component)
        assert torch.equal(adapter.forward(ids), clean)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_weight_shapes(name):
    adapter = adapt(matrix.model(name, "Bridge raw"))
    expected = matrix.plain(name).weights(lambda parameter: parameter.detach())
    assert set(adapter.components) == set(expected)
    for component, layers in expected.items():
        for layer, matrices in enumerate(layers):
            assert torch.equal(adapter.weight(layer, component).values, matrices)


def test_gradients_reach_processed_gated_mlps_and_nothing_is_left_behind():
    """TransformerLens 3.9 computes them with plain tensors that share the parameter's memory."""
    result = matrix.model("llama", "Bridge folded")
    # TransformerLens fills tables of names in the first run.
    mc.scan(result, matrix.paragraphs("llama"), progress=False)
    mc.activation_gradients(result, matrix.paragraphs("llama"), sites=["z"], progress=False)
    before = [dict(vars(module)) for module in result.modules()]
    mc.parameter_gradients(result, matrix.paragraphs("llama"), progress=False)
    for module, values in zip(result.modules(), before, strict=True):
        assert vars(module).keys() == values.keys()
        assert all(vars(module)[key] is value for key, value in values.items())
