"""Gradients of weights equal plain autograd and finite differences."""

from __future__ import annotations

import pytest
import torch

from memcircuits.measure.gradients import mean_gradient, paragraph_gradients
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.gradients import PARAGRAPHS, double_bridge, relative_error
from tests.helpers.oracle import Plain


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_gradients_equal_plain_autograd_weight_by_weight(name):
    plain = Plain(name, zoo.hf_model(name).double()).gradients(PARAGRAPHS.ids, 10)
    adapter = adapt(double_bridge(name))
    weights = adapter.weights()
    _, result = mean_gradient(adapter, PARAGRAPHS, weights, progress=False)
    for weight, gradient in zip(weights, result, strict=True):
        expected = plain[weight.component][weight.layer]
        assert relative_error(weight.split(gradient), expected) < 1e-6, weight


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
@pytest.mark.parametrize("variant", ["Bridge raw", "HookedTransformer raw"])
def test_each_paragraphs_gradient_is_that_of_the_paragraph_alone(name, variant):
    if variant not in matrix.variants():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    # In float64: the smallest gradients of a float32 model are all rounding on some machines.
    model = double_bridge(name) if variant == "Bridge raw" else zoo.hooked(name).double()
    adapter = adapt(model)
    weights = adapter.weights()
    losses, result = paragraph_gradients(
        adapter, PARAGRAPHS, weights, lambda _, g: g, progress=False
    )
    for row, paragraph in enumerate(PARAGRAPHS):
        loss, alone = mean_gradient(adapter, paragraph, weights, progress=False)
        assert float(losses[row]) == pytest.approx(loss, rel=1e-5)
        for weight, each, gradient in zip(weights, result, alone, strict=True):
            assert relative_error(each[row], weight.split(gradient)) < 1e-6, weight


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_a_gradient_is_the_derivative_of_the_loss(name):
    adapter = adapt(double_bridge(name))
    weights = adapter.weights()
    _, gradients = mean_gradient(adapter, PARAGRAPHS, weights, progress=False)

    def loss() -> float:
        with adapter.preserving_state():
            logits = adapter.run(PARAGRAPHS.ids[:, :-1], positions=slice(9, None)).logits
        log_p = logits.log_softmax(-1).gather(-1, PARAGRAPHS.continuation[..., None])
        return -float(log_p.mean())

    for weight, gradient in zip(weights, gradients, strict=True):
        grad = weight.split(gradient)
        place = torch.unravel_index(grad.abs().argmax(), grad.shape)
        kept = weight.values[place].clone()
        around = []
        for step in (1e-3, -1e-3):  # several architectures compute norms and softmax in float32
            weight.values[place] = kept + step
            around.append(loss())
        weight.values[place] = kept
        assert (around[0] - around[1]) / 2e-3 == pytest.approx(float(grad[place]), rel=1e-2)
