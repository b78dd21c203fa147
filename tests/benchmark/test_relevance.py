"""AttnLRP against its rules written into a transformers model, in float64."""

import pytest
import torch
from torch import nn

import memcircuits as mc
from memcircuits.benchmark.localizers import localize
from memcircuits.benchmark.relevance import attn_lrp
from memcircuits.benchmark.units import LocalizationTask
from memcircuits.measure.continuation import continuation_logits
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import double_bridge

TARGETS, CONTROL = (
    mc.Paragraphs.from_tokens(zoo.random_ids(n, 13, n), n_prefix=10) for n in (2, 3)
)


class Half(torch.autograd.Function):
    """A factor of a product, which gets half of the product's relevance."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        return grad / 2


class Norm(nn.Module):
    """A LayerNorm whose standard deviation is a constant."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        std = (x.var(-1, unbiased=False, keepdim=True) + self.plain.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / std * self.plain.weight + self.plain.bias


class Identity(torch.autograd.Function):
    """The tanh form of GELU; backward, the ratio of output and input."""

    @staticmethod
    def forward(context, x):
        y = nn.functional.gelu(x, approximate="tanh")
        context.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(context, grad):
        x, y = context.saved_tensors
        return grad * y / x


def attention(module, query, key, value, *_, **__):
    scores = Half.apply(query) @ Half.apply(key).transpose(-1, -2) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (Half.apply(pattern) @ Half.apply(value)).transpose(1, 2), pattern


def relevance(model, paragraphs):
    """Activation times gradient of every head, then of every MLP."""
    kept = []

    def keep(x):
        x.retain_grad()
        kept.append(x)

    blocks = model.transformer.h
    handles = [
        *(b.attn.c_proj.register_forward_pre_hook(lambda _, args: keep(args[0])) for b in blocks),
        *(b.mlp.register_forward_hook(lambda _, __, out: keep(out)) for b in blocks),
    ]
    logits = model(paragraphs.ids[:, :-1]).logits[:, paragraphs.n_prefix - 1 :]
    logits.gather(-1, paragraphs.continuation[..., None]).mean().backward()
    for handle in handles:
        handle.remove()
    parts = [x * x.grad for x in kept]
    heads = [x.unflatten(-1, (model.config.n_head, -1)).sum((0, 1, 3)) for x in parts[::2]]
    return torch.cat([*heads, torch.stack([x.sum() for x in parts[1::2]])])


def test_relevance_is_that_of_rules_written_by_hand(monkeypatch):
    from transformers.models.gpt2 import modeling_gpt2

    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", attention)
    plain = zoo.hf_model("gpt2").double()
    plain.transformer.ln_f = Norm(plain.transformer.ln_f)
    for block in plain.transformer.h:
        block.ln_1, block.ln_2 = Norm(block.ln_1), Norm(block.ln_2)
        block.mlp.act.forward = Identity.apply
    expected = relevance(plain, TARGETS) - relevance(plain, CONTROL)
    monkeypatch.undo()
    task = LocalizationTask(double_bridge("gpt2"), TARGETS, CONTROL)
    scores = localize(task, "attn-lrp", "component")
    torch.testing.assert_close(scores, expected.float())
    assert not torch.allclose(localize(task, "attribution", "component"), scores, rtol=0.1)


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_no_logit_changes_and_no_hook_stays(name):
    model = double_bridge(name)
    adapter = adapt(model)
    before = [len(module._forward_hooks) for module in model.modules()]
    with adapter.preserving_state():
        plain = continuation_logits(adapter, TARGETS)
        with attn_lrp(adapter) as rules:
            ruled = continuation_logits(adapter, TARGETS, edit=rules)
    torch.testing.assert_close(ruled, plain)
    assert [len(module._forward_hooks) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_without_attention_all_relevance_comes_from_the_stream(name):
    """Norms and MLPs only scale then: the logits are the stream times their gradient in it."""
    model = double_bridge(name)
    adapter = adapt(model)
    stream = "blocks.0.hook_resid_pre"
    kept = {}

    def keep(x):
        kept["x"] = x.detach().requires_grad_()
        return kept["x"]

    with attn_lrp(adapter) as rules, adapter.preserving_state(), torch.enable_grad():
        silent = {f"blocks.{i}.hook_attn_out": torch.zeros_like for i in range(adapter.n_layers)}
        logits = continuation_logits(adapter, TARGETS, edit={**rules, **silent, stream: keep})
        cap = getattr(adapter.hf_config, "final_logit_softcapping", None)
        true = (torch.atanh(logits / cap) * cap if cap else logits).sum()
        (grad,) = torch.autograd.grad(true, kept["x"])
    torch.testing.assert_close((grad * kept["x"]).sum(), true)
