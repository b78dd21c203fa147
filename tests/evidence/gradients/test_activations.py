"""Gradients of activations against finite differences and plain autograd."""

from __future__ import annotations

import contextlib

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.evidence.gradients.activations import (
    GRADIENT_SITES,
    activation_gradients,
    loss_and_gradients,
)
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import PARAGRAPHS, double_bridge
from tests.helpers.oracle import Plain


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_activation_gradients_are_derivatives_of_the_loss(name):
    adapter = adapt(double_bridge(name))
    batch, n = slice(0, 3), PARAGRAPHS.n_continuation
    names = [hook_name(s, layer) for s in GRADIENT_SITES for layer in range(adapter.n_layers)]
    with adapter.preserving_state():
        _, grads = loss_and_gradients(adapter, PARAGRAPHS, batch, names)

    def loss(name: str, step: torch.Tensor) -> torch.Tensor:
        with adapter.preserving_state():
            run = adapter.run(
                PARAGRAPHS.ids[batch, :-1],
                positions=slice(9, None),
                edit={name: lambda activation: activation + step},
            )
        log_p = run.logits.log_softmax(-1)
        return -log_p.gather(-1, PARAGRAPHS.continuation[batch][..., None]).sum((1, 2)) / n

    for hook, grad in zip(names, grads, strict=True):
        norm = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.ndim - 1))
        step = 4e-3 * grad / norm
        rise = (loss(hook, step) - loss(hook, -step)) / 8e-3
        # Uphill by the gradient's direction, the loss rises by the gradient's norm.
        torch.testing.assert_close(rise, norm.flatten(), rtol=3e-2, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_gradients_at_z_equal_those_at_the_output_projection_of_transformers(name):
    plain = Plain(name, zoo.hf_model(name))
    plain.model.requires_grad_(True)
    kept = {}
    ids = PARAGRAPHS.ids[:1]
    with contextlib.ExitStack() as stack:
        for layer in range(plain.n_layers):

            def keep(z: torch.Tensor, layer: int = layer) -> None:
                kept[layer] = z
                z.retain_grad()

            stack.enter_context(plain.head_input(layer, keep))
        # The hook sees a view of the projection's input: its gradient comes from the view's base.
        loss = plain.nll(ids, 10).mean()
    bases = [kept[layer]._base for layer in range(plain.n_layers)]
    grads = torch.autograd.grad(loss, bases)
    gradients = activation_gradients(zoo.bridge(name), PARAGRAPHS[:1], sites=("z",), progress=False)
    for layer, grad in enumerate(grads):
        grad_z = grad.reshape(ids.shape[1], plain.n_heads, -1)[:-1]
        expected = grad_z.abs().amax(-1).T
        torch.testing.assert_close(gradients.values["z"][layer], expected, rtol=1e-4, atol=1e-8)


def test_one_token_per_paragraph(neo):
    tokens = [0, 3, 11, 5, 2]
    gradients = activation_gradients(
        neo, PARAGRAPHS, token=tokens, sites=("q", "post"), progress=False
    )
    losses = -mc.scan(neo, PARAGRAPHS, progress=False).token_log_prob[range(5), tokens]
    assert gradients.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    first = activation_gradients(neo, PARAGRAPHS, token=0, sites=("v",), progress=False)
    # The first continuation token is predicted at the last prefix position: later ones are idle.
    assert float(first.values["v"][..., :10].abs().max()) > 0
    assert float(first.values["v"][..., 10:].abs().max()) == 0
    assert gradients.values["q"].shape == (4, 4, 21)
    assert gradients.values["post"].shape == (4, 1, 21)


def test_mean_and_standard_error_over_paragraphs(neo):
    alone = [
        activation_gradients(neo, p, sites=("k",), progress=False).values["k"] for p in PARAGRAPHS
    ]
    gradients = activation_gradients(neo, PARAGRAPHS, sites=("k",), progress=False)
    stacked = torch.stack(alone)
    torch.testing.assert_close(gradients.values["k"], stacked.mean(0), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(gradients.error["k"], stacked.std(0) / 5**0.5, rtol=1e-3, atol=1e-8)
    frame = gradients.to_frame()
    assert len(frame) == 4 * 4 * 21
    assert frame["value"].max() == pytest.approx(float(gradients.values["k"].max()))


def test_activation_gradients_survive_saving(neo, tmp_path):
    gradients = activation_gradients(neo, PARAGRAPHS, sites=("z", "pre"), progress=False)
    again = type(gradients).load(gradients.save(tmp_path / "activations.safetensors"))
    assert again.to_frame().equals(gradients.to_frame())


def test_reading_the_loss_agrees_with_measure(neo):
    gradients = activation_gradients(neo, PARAGRAPHS, sites=("z",), progress=False)
    adapter = adapt(neo)
    with adapter.preserving_state():
        run = adapter.run(PARAGRAPHS.ids[:, :-1], positions=slice(9, None))
        expected = read_continuation(run.logits, PARAGRAPHS.continuation).nll.mean()
    assert gradients.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: activation_gradients(m, PARAGRAPHS, sites=("mlp",)), "sites"),
        (lambda m: activation_gradients(m, PARAGRAPHS, sites="z"), "sites"),
        (lambda m: activation_gradients(m, PARAGRAPHS, sites=()), "sites"),
        (lambda m: activation_gradients(m, PARAGRAPHS, token=12), "token"),
        (lambda m: activation_gradients(m, PARAGRAPHS, token=[1, 2]), "token"),
        (lambda m: activation_gradients(m, [[5, 3], [4]]), "ids"),
    ],
)
def test_bad_input_is_named(neo, call, argument):
    with pytest.raises(InputError, match=f"^{argument}:"):
        call(neo)
