"""Ablations equal hand-written hooks on the plain transformers model."""

import pytest
import torch

import memcircuits as mc
from tests.helpers import models as zoo

# Where each architecture's attention output enters its output projection.
PROJECTION = {
    "gpt_neo": "transformer.h.{}.attn.attention.out_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "neox": "gpt_neox.layers.{}.attention.dense",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen3": "model.layers.{}.self_attn.o_proj",
    "gemma2": "model.layers.{}.self_attn.o_proj",
}


def nll_with_head_replaced(name, paragraphs, layer, head, replace):
    """NLL per paragraph from the HF model, the input of W_O changed by a plain forward hook."""
    model = zoo.hf_model(name)
    d_head = 8

    def hook(module, args):
        z = args[0].clone()
        z[..., head * d_head : (head + 1) * d_head] = replace(
            z[..., head * d_head : (head + 1) * d_head]
        )
        return (z,)

    handle = None
    if layer is not None:
        handle = model.get_submodule(PROJECTION[name].format(layer)).register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = model(paragraphs.ids[:, :-1]).logits[:, paragraphs.n_prefix - 1 :]
    if handle:
        handle.remove()
    log_prob = logits.log_softmax(-1).gather(-1, paragraphs.continuation[..., None])[..., 0]
    return -log_prob.mean(-1)


@pytest.mark.parametrize("name", sorted(PROJECTION))
def test_zero_ablation_equals_a_plain_hook(name):
    model = zoo.bridge(name)
    paragraphs = zoo.mixed(model)
    result = mc.ablate_heads(model, paragraphs).samples["nll"]
    clean = nll_with_head_replaced(name, paragraphs, None, 0, None)
    for layer, head in [(0, 0), (1, 3), (2, 2)]:
        ablated = nll_with_head_replaced(name, paragraphs, layer, head, torch.zeros_like)
        torch.testing.assert_close(result[:, layer, head], ablated - clean, atol=1e-5, rtol=0)
        assert result[:, layer, head].abs().max() > 1e-4


def test_mean_ablation_equals_a_plain_hook(neo):
    paragraphs = zoo.mixed(neo)
    result = mc.ablate_heads(neo, paragraphs, mode="mean").samples["nll"]
    clean = nll_with_head_replaced("gpt_neo", paragraphs, None, 0, None)
    ablated = nll_with_head_replaced(
        "gpt_neo", paragraphs, 1, 2, lambda z: z.mean(0, keepdim=True).expand_as(z)
    )
    torch.testing.assert_close(result[:, 1, 2], ablated - clean, atol=1e-5, rtol=0)


def test_resampling_a_paragraph_with_itself_changes_nothing(neo):
    paragraphs = zoo.mixed(neo)[[0]]
    effects = mc.ablate_heads(neo, paragraphs, mode="resample", reference=paragraphs)
    torch.testing.assert_close(effects.values, torch.zeros_like(effects.values), atol=1e-6, rtol=0)


def test_resampling_takes_the_z_of_another_paragraph(neo):
    pair = zoo.mixed(neo)[[0, 4]]
    result = mc.ablate_heads(neo, pair, mode="resample").samples["nll"]  # each gets the other's
    clean = nll_with_head_replaced("gpt_neo", pair, None, 0, None)
    swapped = nll_with_head_replaced("gpt_neo", pair, 2, 1, lambda z: z.flip(0))
    torch.testing.assert_close(result[:, 2, 1], swapped - clean, atol=1e-5, rtol=0)


def test_em_effect_counts_tokens(neo):
    paragraphs = zoo.mixed(neo)
    em = mc.ablate_heads(neo, paragraphs).samples["em"]
    assert em[:4].min() >= -12
    assert em[:4].max() <= 0
    assert em[:4].min() < 0  # some head matters
    assert (em == em.round()).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "one"}, "mode"),
        ({"mode": "mean", "reference": torch.zeros(2, 99, dtype=torch.long)}, "same length"),
        ({"memory_budget": 0}, "memory_budget"),
    ],
)
def test_bad_options(neo, options, says):
    with pytest.raises(mc.InputError, match=says):
        mc.ablate_heads(neo, zoo.mixed(neo), **options)


def test_resampling_needs_another_paragraph(neo):
    with pytest.raises(mc.InputError, match="resampling needs another"):
        mc.ablate_heads(neo, zoo.mixed(neo)[[0]], mode="resample")
