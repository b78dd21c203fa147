"""Gradients against plain autograd, finite differences and the curvature they claim to know."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

import memcircuits as mc
from memcircuits.core.errors import InputError
from memcircuits.evidence.gradients.activations import (
    GRADIENT_SITES,
    activation_gradients,
    loss_and_gradients,
)
from memcircuits.evidence.gradients.contrastive import contrastive_gradients
from memcircuits.evidence.gradients.pooling import summarize
from memcircuits.measure.continuation import read_continuation
from memcircuits.measure.fisher import fisher_diagonal
from memcircuits.measure.gradients import mean_gradient, paragraph_gradients
from memcircuits.models.hooks import hook_name
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain

ARCHITECTURES = sorted(zoo.ARCHITECTURES)
PARAGRAPHS = mc.Paragraphs.from_tokens(zoo.random_ids(5, 22), n_prefix=10)
CONTROL = mc.Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=1), n_prefix=10)


@functools.cache
def double_bridge(name: str):
    """A tiny bridge in float64, where finite differences are sharp."""
    return as_bridge(zoo.hf_model(name).double(), zoo.tokenizer(), name=f"tiny-{name}")


def relative(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# -- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_plain_autograd_weight_by_weight(name):
    plain = Plain(name, zoo.hf_model(name).double()).gradients(PARAGRAPHS.ids, 10)
    adapter = adapt(double_bridge(name))
    weights = adapter.weights()
    _, found = mean_gradient(adapter, PARAGRAPHS, weights, progress=False)
    for weight, gradient in zip(weights, found, strict=True):
        expected = plain[weight.component][weight.layer]
        assert relative(weight.split(gradient), expected) < 1e-6, weight


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["Bridge raw", "HookedTransformer raw"])
def test_each_paragraphs_gradient_is_that_of_the_paragraph_alone(name, variant):
    if variant not in matrix.variants():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    # In float64: the smallest gradients of a float32 model are all rounding on some machines.
    model = double_bridge(name) if variant == "Bridge raw" else zoo.hooked(name).double()
    adapter = adapt(model)
    weights = adapter.weights()
    losses, found = paragraph_gradients(
        adapter, PARAGRAPHS, weights, lambda _, g: g, progress=False
    )
    for row, paragraph in enumerate(PARAGRAPHS):
        loss, alone = mean_gradient(adapter, paragraph, weights, progress=False)
        assert float(losses[row]) == pytest.approx(loss, rel=1e-5)
        for weight, each, gradient in zip(weights, found, alone, strict=True):
            assert relative(each[row], weight.split(gradient)) < 1e-6, weight


@pytest.mark.parametrize("budget", [1, 20_000_000])
def test_batches_do_not_change_the_gradients(neo, budget):
    whole = mc.parameter_gradients(neo, PARAGRAPHS, average="paragraph", progress=False)
    parts = mc.parameter_gradients(
        neo, PARAGRAPHS, average="paragraph", memory_budget=budget, progress=False
    )
    for component, values in whole.samples.items():
        assert relative(parts.samples[component], values) < 1e-5


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


def test_pools_and_statistics_are_what_they_say():
    gradient = torch.tensor([[[3.0, -4.0], [0.0, 1.0]]])
    variance = (9 + 16 + 1) / 4 - 0.0
    for pool, value in {"max": 4.0, "mean": 2.0, "l2": 26**0.5}.items():
        assert summarize(gradient, pool)[:, 0].tolist() == pytest.approx(
            [value, 8.0, variance, 4.0]
        )


def test_paragraphs_cannot_cancel_when_each_is_pooled(neo):
    batch = mc.parameter_gradients(neo, PARAGRAPHS, progress=False)
    each = mc.parameter_gradients(neo, PARAGRAPHS, average="paragraph", progress=False)
    assert not batch.samples
    assert each.samples["W_in"].shape == (5, 4, 1)
    for component, values in batch.values.items():
        assert (each.values[component] >= values - 1e-6).all()  # max is convex
        torch.testing.assert_close(each.statistics[component][2], each.values[component])


@pytest.mark.parametrize("average", ["batch", "paragraph"])
def test_dividing_by_the_loss(neo, average):
    raw = mc.parameter_gradients(neo, PARAGRAPHS[:1], average=average, progress=False)
    divided = mc.parameter_gradients(
        neo, PARAGRAPHS[:1], average=average, per_loss=True, progress=False
    )
    for component, values in raw.values.items():
        torch.testing.assert_close(divided.values[component], values / raw.loss)
        torch.testing.assert_close(
            divided.statistics[component][1], raw.statistics[component][1] / raw.loss**2
        )
    assert divided.layer_share() == pytest.approx(raw.layer_share())
    assert divided.units != raw.units


def test_the_model_is_left_as_it_came():
    model = zoo.bridge("gpt_neo")
    adapter = adapt(model)
    flags = [p.requires_grad for p in model.parameters()]
    before = adapter.fingerprint()
    contrastive_gradients(model, PARAGRAPHS, CONTROL, draws=1, progress=False)
    mc.parameter_gradients(model, PARAGRAPHS, average="paragraph", progress=False)
    activation_gradients(model, PARAGRAPHS, progress=False)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert adapter.fingerprint() == before
    assert not any(m._forward_hooks for w in adapter.weights() if (m := w.module) is not None)


def test_results_survive_saving(neo, tmp_path):
    found = contrastive_gradients(neo, PARAGRAPHS, CONTROL, draws=1, progress=False)
    again = type(found).load(found.save(tmp_path / "gradients.safetensors"))
    assert again.to_frame().equals(found.to_frame())
    assert again.provenance == found.provenance
    assert {"cosine", "sum", "variance", "max"} <= set(found.to_frame())


# -- the contrastive objective --------------------------------------------------------------------


def test_the_kl_term_has_no_gradient_at_the_original_weights(neo):
    adapter = adapt(neo)
    weights = adapter.weights()
    parameters = [w.parameter for w in weights]
    _, of_nll = mean_gradient(adapter, PARAGRAPHS, weights, progress=False)
    with adapter.preserving_state(grad=parameters):
        logits = adapter.run(CONTROL.ids[:, :-1], positions=slice(9, None)).logits
        log_p = logits.log_softmax(-1)
        kl = (log_p.detach().exp() * (log_p.detach() - log_p)).sum(-1).mean()
        of_kl = torch.autograd.grad(kl, parameters)
    largest = max(float(g.abs().max()) for g in of_nll)
    assert max(float(g.abs().max()) for g in of_kl) < 1e-6 * largest
    one, other = (
        contrastive_gradients(neo, PARAGRAPHS, c, curvature=False, progress=False)
        for c in (CONTROL, CONTROL[:2])
    )
    alone = mc.parameter_gradients(neo, PARAGRAPHS, average="paragraph", progress=False)
    for component, values in alone.values.items():
        assert torch.equal(one.values[component], other.values[component])
        torch.testing.assert_close(one.values[component], values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_the_fisher_diagonal_predicts_the_kl_of_a_changed_weight(name):
    adapter = adapt(double_bridge(name))
    weights = adapter.weights()
    generator = torch.Generator().manual_seed(0)
    fisher = fisher_diagonal(adapter, CONTROL, weights, 200, generator)

    def log_p():
        with adapter.preserving_state():
            logits = adapter.run(CONTROL.ids[:, :-1], positions=slice(9, None)).logits
        return logits.log_softmax(-1)

    original = log_p()
    for weight, curvature in list(zip(weights, fisher, strict=True))[::5]:
        information = weight.split(curvature)
        place = torch.unravel_index(information.argmax(), information.shape)
        kept = weight.values[place].clone()
        step = 0.02 / float(information[place]) ** 0.5
        measured = 0.0
        for sign in (1, -1):  # the cubic term cancels
            weight.values[place] = kept + sign * step
            measured += float((original.exp() * (original - log_p())).sum(-1).mean()) / 2
        weight.values[place] = kept
        # The largest of many estimates is biased upwards: hence the wide bounds.
        assert measured == pytest.approx(0.5 * 0.02**2, rel=0.35)


def test_curvature_ranks_weights_that_controls_need_lower(neo):
    adapter = adapt(neo)
    weights = adapter.weights()
    generator = torch.Generator().manual_seed(0)
    fisher = fisher_diagonal(adapter, CONTROL, weights, 20, generator)
    again = fisher_diagonal(adapter, CONTROL, weights, 20, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(fisher, again, strict=True))
    assert all((f >= 0).all() for f in fisher)
    found = contrastive_gradients(neo, PARAGRAPHS, CONTROL, seed=3, progress=False)
    same = contrastive_gradients(neo, PARAGRAPHS, CONTROL, seed=3, progress=False)
    assert found.to_frame().equals(same.to_frame())
    assert all((c.abs() <= 1 + 1e-5).all() for c in found.cosine.values())
    assert found.objective == "contrastive"


def test_cosine_of_a_set_with_a_copy_of_itself_is_one(neo):
    twin = mc.Paragraphs(PARAGRAPHS.ids.clone(), 10)
    twin.ids[:, 0] = (twin.ids[:, 0] + 1) % zoo.D_VOCAB  # other ids, all but the same paragraphs
    found = contrastive_gradients(neo, PARAGRAPHS, twin, curvature=False, progress=False)
    other = contrastive_gradients(neo, PARAGRAPHS, CONTROL, curvature=False, progress=False)
    assert float(found.cosine["W_out"].mean()) > 0.8 > float(other.cosine["W_out"].mean())


# -- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
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
    found = activation_gradients(zoo.bridge(name), PARAGRAPHS[:1], sites=("z",), progress=False)
    for layer, grad in enumerate(grads):
        grad_z = grad.reshape(ids.shape[1], plain.n_heads, -1)[:-1]
        expected = grad_z.abs().amax(-1).T
        torch.testing.assert_close(found.values["z"][layer], expected, rtol=1e-4, atol=1e-8)


def test_one_token_per_paragraph(neo):
    tokens = [0, 3, 11, 5, 2]
    found = activation_gradients(neo, PARAGRAPHS, token=tokens, sites=("q", "post"), progress=False)
    losses = -mc.scan(neo, PARAGRAPHS, progress=False).token_log_prob[range(5), tokens]
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    first = activation_gradients(neo, PARAGRAPHS, token=0, sites=("v",), progress=False)
    # The first continuation token is predicted at the last prefix position: later ones are idle.
    assert float(first.values["v"][..., :10].abs().max()) > 0
    assert float(first.values["v"][..., 10:].abs().max()) == 0
    assert found.values["q"].shape == (4, 4, 21)
    assert found.values["post"].shape == (4, 1, 21)


def test_mean_and_standard_error_over_paragraphs(neo):
    alone = [
        activation_gradients(neo, p, sites=("k",), progress=False).values["k"] for p in PARAGRAPHS
    ]
    found = activation_gradients(neo, PARAGRAPHS, sites=("k",), progress=False)
    stacked = torch.stack(alone)
    torch.testing.assert_close(found.values["k"], stacked.mean(0), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found.error["k"], stacked.std(0) / 5**0.5, rtol=1e-3, atol=1e-8)
    frame = found.to_frame()
    assert len(frame) == 4 * 4 * 21
    assert frame["value"].max() == pytest.approx(float(found.values["k"].max()))


def test_activation_gradients_survive_saving(neo, tmp_path):
    found = activation_gradients(neo, PARAGRAPHS, sites=("z", "pre"), progress=False)
    again = type(found).load(found.save(tmp_path / "activations.safetensors"))
    assert again.to_frame().equals(found.to_frame())


def test_reading_the_loss_agrees_with_measure(neo):
    found = activation_gradients(neo, PARAGRAPHS, sites=("z",), progress=False)
    adapter = adapt(neo)
    with adapter.preserving_state():
        run = adapter.run(PARAGRAPHS.ids[:, :-1], positions=slice(9, None))
        expected = read_continuation(run.logits, PARAGRAPHS.continuation).nll.mean()
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: mc.parameter_gradients(m, PARAGRAPHS, pool="median"), "pool"),
        (lambda m: mc.parameter_gradients(m, PARAGRAPHS, average="none"), "average"),
        (lambda m: contrastive_gradients(m, PARAGRAPHS, PARAGRAPHS[1:]), "control"),
        (lambda m: contrastive_gradients(m, PARAGRAPHS, CONTROL, n_control=0), "n_control"),
        (lambda m: contrastive_gradients(m, PARAGRAPHS, CONTROL, draws=0), "draws"),
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


@pytest.mark.parametrize("average", ["batch", "paragraph"])
def test_some_components_alone_have_the_same_gradients(any_bridge, average):
    options = {"average": average, "progress": False}
    paragraphs = zoo.mixed(any_bridge, n=2)
    whole = mc.parameter_gradients(any_bridge, paragraphs, **options)
    some = mc.parameter_gradients(any_bridge, paragraphs, components=["W_V", "W_out"], **options)
    assert list(some.values) == ["W_V", "W_out"]
    for name, values in some.values.items():
        torch.testing.assert_close(values, whole.values[name], atol=1e-6, rtol=1e-5)
    assert set(some.to_frame()["component"]) == {"W_V", "W_out"}
    assert some.figure() is not None
    n_heads = adapt(any_bridge).n_heads
    assert (some.per_head(n_heads) <= whole.per_head(n_heads) + 1e-6).all()


@pytest.mark.parametrize("components", [[], "W_Q", ["W_X"]])
def test_components_that_are_none(neo, components):
    with pytest.raises(mc.InputError, match="components"):
        mc.parameter_gradients(neo, PARAGRAPHS, components=components, progress=False)
