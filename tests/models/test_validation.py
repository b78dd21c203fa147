"""Models that break a statement that the analyses rely on are refused, with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt, validate_model
from memcircuits.models.validation import run_checks
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.variants import EVERY_MODEL, model, own_bridge


@pytest.mark.parametrize(("name", "variant"), EVERY_MODEL)
def test_report(name, variant):
    result = model(name, variant)
    report = validate_model(result)
    assert validate_model(result) is report
    config = matrix.plain(name).model.config
    kind, _ = variant.split()
    assert report.kind.endswith(kind)
    assert (report.n_layers, report.n_heads) == (
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    assert report.n_kv_heads == (getattr(config, "num_key_value_heads", None) or report.n_heads)
    assert (report.d_vocab, report.n_ctx, report.dtype) == (zoo.D_VOCAB, zoo.N_CTX, "float32")
    local = {"gpt_neo": (1, 3), "gemma2": (0, 2)}
    assert report.local_layers == local.get(name, ())
    assert report.parallel == (name == "neox")
    assert report.supports_partial_forward
    assert {"q", "k", "v", "z"} <= set(report.writable)
    # Attention that TransformerLens only observes ignores writes to the pattern.
    assert ("pattern" in report.writable) == (
        kind == "HookedTransformer" or name not in ("gpt_neo", "opt")
    )
    assert all(value is None or value < 1e-5 for value in report.checks.values())
    assert (report.checks["plain forward"] is None) == (kind == "HookedTransformer")


def _scaled_pattern(result):
    for block in result.blocks:
        block.attn.hook_pattern.add_hook(lambda pattern, hook: pattern * 0.5)


def _mean_over_rows(result):
    def hook(module, args, out):
        return out + out.mean(0, keepdim=True) * len(out)

    result.ln_final.register_forward_hook(hook)


def _sees_the_future(result):
    def hook(module, args, out):
        return out + out.mean(1, keepdim=True)

    result.embed.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_scaled_pattern, "attention rows do not sum to 1"),
        (_mean_over_rows, "a row alone gives other logits"),
        (_sees_the_future, "decoding token by token"),
    ],
)
def test_a_model_that_breaks_a_statement_is_refused(spoil, message):
    result = own_bridge()
    spoil(result)
    with pytest.raises(UnsupportedModel, match=message):
        run_checks(adapt(result))


def test_heads_in_another_order_are_noticed(monkeypatch):
    result = own_bridge()
    adapter = adapt(result)
    weight = Adapter.weight

    def swapped(self, layer, component):
        right = weight(self, layer, component)
        return dataclasses.replace(right, split=lambda tensor: right.split(tensor).flip(0))

    monkeypatch.setattr(Adapter, "weight", swapped)
    with pytest.raises(UnsupportedModel, match=r"does not remove z @ W_O"):
        run_checks(adapter)


def test_edits_that_do_nothing_are_noticed(monkeypatch):
    result = own_bridge()
    adapter = adapt(result)
    run = Adapter.run
    monkeypatch.setattr(
        Adapter, "run", lambda self, *args, edit=None, **options: run(self, *args, **options)
    )
    with pytest.raises(UnsupportedModel, match="zeroing a head"):
        run_checks(adapter)


def test_prepended_tokens_are_noticed(monkeypatch):
    result = own_bridge()
    adapter = adapt(result)
    forward = Adapter.forward

    def with_bos(self, tokens):
        bos = torch.zeros(len(tokens), 1, dtype=torch.long)
        return forward(self, torch.cat([bos, tokens.cpu()], 1))[:, -tokens.shape[1] :]

    monkeypatch.setattr(Adapter, "forward", with_bos)
    with pytest.raises(UnsupportedModel, match="the transformers module inside"):
        run_checks(adapter)


def test_non_finite_model_is_refused():
    result = own_bridge()
    with torch.no_grad():
        result.ln_final.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="not finite: load it in float32"):
        run_checks(adapt(result))


def test_a_refused_model_stays_refused(monkeypatch):
    source = zoo.hf_model("gpt2")
    with torch.no_grad():
        source.transformer.ln_f.weight.fill_(float("nan"))
    from transformer_lens.model_bridge import TransformerBridge

    result = TransformerBridge.boot_transformers("x", hf_model=source, tokenizer=zoo.tokenizer())
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="not finite"):
            adapt(result)


@pytest.mark.parametrize("value", [None, nn.Linear(2, 2), object()])
def test_not_a_model(value):
    with pytest.raises(UnsupportedModel, match=r"model: .*; pass a HookedTransformer"):
        mc.scan(value, zoo.random_ids(1, 60))
