"""Pooled gradients of weights: batches, pools, statistics, components."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.evidence.gradients.activations import activation_gradients
from memcircuits.evidence.gradients.contrastive import contrastive_gradients
from memcircuits.evidence.gradients.pooling import summarize
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import CONTROL, PARAGRAPHS, relative_error


@pytest.mark.parametrize("budget", [1, 20_000_000])
def test_batches_do_not_change_the_gradients(neo, budget):
    whole = mc.parameter_gradients(neo, PARAGRAPHS, average="paragraph", progress=False)
    parts = mc.parameter_gradients(
        neo, PARAGRAPHS, average="paragraph", memory_budget=budget, progress=False
    )
    for component, values in whole.samples.items():
        assert relative_error(parts.samples[component], values) < 1e-5


def test_pools_and_statistics_are_what_they_say():
    gradient = torch.tensor([[[3.0, -4.0], [0.0, 1.0]]])
    variance = (9 + 16 + 1) / 4 - 0.0
    for pool, value in {"max": 4.0, "mean": 2.0, "l2": 26**0.5}.items():
        assert summarize(gradient, pool)[:, 0].tolist() == pytest.approx(
            [value, 8.0, 0.0, variance, 3.0, -4.0]
        )


def test_statistics_of_components_are_those_of_plain_autograd(neo):
    """Figure 9: over all layers of a component at once, from the transformers model alone."""
    result = mc.parameter_gradients(neo, PARAGRAPHS, progress=False)
    plain = zoo.hf_model("gpt_neo")
    logits = plain(PARAGRAPHS.ids[:, :-1]).logits[:, PARAGRAPHS.n_prefix - 1 :]
    log_p = logits.log_softmax(-1).gather(-1, PARAGRAPHS.continuation[..., None])
    (-log_p.mean()).backward()
    blocks = plain.transformer.h
    modules = {
        "W_Q": [b.attn.attention.q_proj for b in blocks],
        "W_O": [b.attn.attention.out_proj for b in blocks],
        "W_in": [b.mlp.c_fc for b in blocks],
    }
    frame = result.component_statistics().set_index("component")
    assert set(frame.index) == set(result.values)
    for component, layers in modules.items():
        g = torch.stack([module.weight.grad for module in layers])
        expected = {
            "sum": g.abs().sum(),
            "variance": g.var(correction=0),
            "max": g.max(),
            "min": g.min(),
        }
        for name, value in expected.items():
            assert frame.loc[component, name] == pytest.approx(float(value), rel=1e-3), name
    layer_sums = result.layer_sums().query("layer == 2 and part == 'MLP'")["sum"].item()
    mlp = [blocks[2].mlp.c_fc.weight, blocks[2].mlp.c_proj.weight]
    assert layer_sums == pytest.approx(float(sum(w.grad.abs().sum() for w in mlp)), rel=1e-3)


def test_paragraphs_cannot_cancel_when_each_is_pooled(neo):
    batch = mc.parameter_gradients(neo, PARAGRAPHS, progress=False)
    each = mc.parameter_gradients(neo, PARAGRAPHS, average="paragraph", progress=False)
    assert not batch.samples
    assert each.samples["W_in"].shape == (5, 4, 1)
    for component, values in batch.values.items():
        assert (each.values[component] >= values - 1e-6).all()  # max is convex


@pytest.mark.parametrize("average", ["batch", "paragraph"])
def test_dividing_by_the_loss(neo, average):
    raw = mc.parameter_gradients(neo, PARAGRAPHS[:1], average=average, progress=False)
    divided = mc.parameter_gradients(
        neo, PARAGRAPHS[:1], average=average, per_loss=True, progress=False
    )
    for component, values in raw.values.items():
        torch.testing.assert_close(divided.values[component], values / raw.loss)
        torch.testing.assert_close(
            divided.statistics[component][2], raw.statistics[component][2] / raw.loss**2
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


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: mc.parameter_gradients(m, PARAGRAPHS, pool="median"), "pool"),
        (lambda m: mc.parameter_gradients(m, PARAGRAPHS, average="none"), "average"),
    ],
)
def test_bad_input_is_named(neo, call, argument):
    with pytest.raises(InputError, match=f"^{argument}:"):
        call(neo)
