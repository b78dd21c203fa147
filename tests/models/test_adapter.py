"""The adapter: one view of every architecture and class, checked against plain PyTorch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import memcircuits as mc
from memcircuits.core.errors import InputError, UnsupportedModel
from memcircuits.core.heads import Head
from memcircuits.editing.evaluation import edit_divergence, evaluate_edit
from memcircuits.editing.recipe import Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt, validate_model
from memcircuits.models.validation import run_checks
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.calls import public_functions

ANY = [(name, variant) for name in zoo.ARCHITECTURES for variant in matrix.VARIANTS]
HOOKED = pytest.mark.skipif(
    not zoo.has_hooked(), reason="transformer-lens 4 has no HookedTransformer"
)


def model(name: str, variant: str):
    if variant not in matrix.variants():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    return matrix.model(name, variant)


def bridge(name: str = "gpt2"):
    """A bridge of its own, for tests that change it."""
    return as_bridge(zoo.shaken(zoo.hf_model(name)), zoo.tokenizer(), name=f"tiny-{name}")


# -- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("analysis", matrix.ANALYSES)
@pytest.mark.parametrize(("name", "variant"), ANY)
def test_analysis_agrees_with_plain_pytorch(name, variant, analysis):
    model(name, variant)
    off = matrix.compared(name, variant, analysis)
    assert off is None or off <= matrix.ANALYSES[analysis].tolerance


@HOOKED
@pytest.mark.parametrize("analysis", matrix.ANALYSES)
@pytest.mark.parametrize("basis", ["raw", "folded"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_classes_agree_in_the_same_basis(name, basis, analysis):
    line = matrix.ANALYSES[analysis]
    pair = [matrix.measured(name, f"{kind} {basis}", analysis) for kind in matrix.CLASSES]
    assert matrix.difference(*pair, line.relative) <= line.tolerance


def test_every_public_analysis_is_in_the_matrix():
    assert public_functions() - {name.partition(",")[0] for name in matrix.ANALYSES} == set()


def test_matrix_sees_a_difference():
    """A comparison that accepts anything would pass the tests above."""
    same = {"em": torch.tensor([3, 4]), "nll": torch.tensor([1.0, 2.0])}
    assert matrix.difference(same, same, False) == 0
    assert matrix.difference(same, same | {"em": torch.tensor([3, 5])}, False) == float("inf")
    assert matrix.difference(same, {"em": same["em"]}, False) == float("inf")
    off = same | {"nll": torch.tensor([1.0, 2.5])}
    assert matrix.difference(off, same, False) == pytest.approx(0.5)
    assert matrix.difference(off, same, True) == pytest.approx(0.25)


@pytest.mark.parametrize(("name", "variant"), ANY)
def test_basis_is_recognized(name, variant):
    found = model(name, variant)
    assert adapt(found).basis == variant.split()[1]
    paragraphs = matrix.paragraphs(name)
    assert mc.scan(found, paragraphs, progress=False).provenance.basis == variant.split()[1]


@HOOKED
@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama"])
def test_folded_value_biases_are_another_basis(name):
    """`HookedTransformer.from_pretrained(name, fold_ln=False)` folds them: z loses b_V."""
    found = zoo.hooked(name, zoo.shaken(zoo.hf_model(name)))
    assert adapt(found).basis == "raw"
    weights = {key: value.clone() for key, value in found.state_dict().items()}
    found.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    assert adapt(found).basis == ("folded" if name == "gpt2" else "raw")  # it alone has such biases


def test_basis_without_processing_is_raw():
    found = bridge()
    found.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert adapt(found).basis == "raw"


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), ANY)
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
    found = matrix.model("llama", "Bridge folded")
    before = [dict(vars(module)) for module in found.modules()]
    mc.parameter_gradients(found, matrix.paragraphs("llama"), progress=False)
    for module, values in zip(found.modules(), before, strict=True):
        assert vars(module).keys() == values.keys()
        assert all(vars(module)[key] is value for key, value in values.items())


# -- forward passes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), ANY)
def test_tokens_equal_to_special_ones_are_ordinary(name, variant):
    """Rows of BOS, EOS and padding ids get the logits of the plain model: nothing is masked."""
    adapter = adapt(model(name, variant))
    ids = torch.tensor([[0, 0, 5, 0, 1, 1, 7, 0], [1, 2, 3, 0, 0, 0, 4, 1]])
    with adapter.preserving_state(), torch.no_grad():
        plain = matrix.plain(name).model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
        found = adapter.forward(ids).log_softmax(-1)
    assert (found - plain.logits.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "variant"), ANY)
def test_reading_and_positions(name, variant):
    adapter = adapt(model(name, variant))
    ids = zoo.random_ids(2, 9)
    names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    with adapter.preserving_state():
        whole = adapter.run(ids, read=names)
        part = adapter.run(ids, positions=slice(4, None))
    assert torch.allclose(whole.logits[:, 4:], part.logits, atol=1e-5)
    if variant.endswith("raw"):
        for ours, theirs in zip(whole.cache.values(), matrix.plain(name).z(ids), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_unknown_hook_is_refused(neo):
    with pytest.raises(InputError, match=r"hook: 'blocks.0.nothing'"):
        adapt(neo).run(zoo.random_ids(1, 4), read=["blocks.0.nothing"])
    with pytest.raises(InputError, match="hook"):
        adapt(neo).run(zoo.random_ids(1, 4), edit={"blocks.99.attn.hook_z": lambda z: z})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "integer ids"),
        (torch.zeros(2, 3), "integer ids"),
        (torch.zeros(1, zoo.N_CTX + 1, dtype=torch.long), "context is 128"),
        (torch.tensor([[0, zoo.D_VOCAB]]), f"token id {zoo.D_VOCAB}"),
        (torch.tensor([[0, -1]]), "token id -1"),
    ],
)
def test_unusable_tokens(neo, tokens, message):
    with pytest.raises(InputError, match=message):
        adapt(neo).check_tokens(tokens)


def test_heads():
    assert str(Head(1, 2)) == "L1H2"
    assert Head.parse(" l10h3 ") == Head(10, 3)
    for text in ("", "L1", "H1L2", "L-1H2", "L1H2H3", "1.2"):
        with pytest.raises(InputError, match="L1H2"):
            Head.parse(text)


# -- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), ANY)
def test_report(name, variant):
    found = model(name, variant)
    report = validate_model(found)
    assert validate_model(found) is report
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


def _scaled_pattern(found):
    for block in found.blocks:
        block.attn.hook_pattern.add_hook(lambda pattern, hook: pattern * 0.5)


def _mean_over_rows(found):
    def hook(module, args, out):
        return out + out.mean(0, keepdim=True) * len(out)

    found.ln_final.register_forward_hook(hook)


def _sees_the_future(found):
    def hook(module, args, out):
        return out + out.mean(1, keepdim=True)

    found.embed.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_scaled_pattern, "attention rows do not sum to 1"),
        (_mean_over_rows, "a row alone gives other logits"),
        (_sees_the_future, "decoding token by token"),
    ],
)
def test_a_model_that_breaks_a_statement_is_refused(spoil, message):
    found = bridge()
    spoil(found)
    with pytest.raises(UnsupportedModel, match=message):
        run_checks(adapt(found))


def test_heads_in_another_order_are_noticed(monkeypatch):
    found = bridge()
    adapter = adapt(found)
    weight = Adapter.weight

    def swapped(self, layer, component):
        right = weight(self, layer, component)
        return dataclasses.replace(right, split=lambda tensor: right.split(tensor).flip(0))

    monkeypatch.setattr(Adapter, "weight", swapped)
    with pytest.raises(UnsupportedModel, match=r"does not remove z @ W_O"):
        run_checks(adapter)


def test_edits_that_do_nothing_are_noticed(monkeypatch):
    found = bridge()
    adapter = adapt(found)
    run = Adapter.run
    monkeypatch.setattr(
        Adapter, "run", lambda self, *args, edit=None, **options: run(self, *args, **options)
    )
    with pytest.raises(UnsupportedModel, match="zeroing a head"):
        run_checks(adapter)


def test_prepended_tokens_are_noticed(monkeypatch):
    found = bridge()
    adapter = adapt(found)
    forward = Adapter.forward

    def with_bos(self, tokens):
        bos = torch.zeros(len(tokens), 1, dtype=torch.long)
        return forward(self, torch.cat([bos, tokens.cpu()], 1))[:, -tokens.shape[1] :]

    monkeypatch.setattr(Adapter, "forward", with_bos)
    with pytest.raises(UnsupportedModel, match="the transformers module inside"):
        run_checks(adapter)


def test_non_finite_model_is_refused():
    found = bridge()
    with torch.no_grad():
        found.ln_final.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="not finite: load it in float32"):
        run_checks(adapt(found))


def test_a_refused_model_stays_refused(monkeypatch):
    source = zoo.hf_model("gpt2")
    with torch.no_grad():
        source.transformer.ln_f.weight.fill_(float("nan"))
    from transformer_lens.model_bridge import TransformerBridge

    found = TransformerBridge.boot_transformers("x", hf_model=source, tokenizer=zoo.tokenizer())
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="not finite"):
            adapt(found)


@pytest.mark.parametrize("value", [None, "gpt2", nn.Linear(2, 2), object()])
def test_not_a_model(value):
    with pytest.raises(UnsupportedModel, match=r"model: .*; pass a HookedTransformer"):
        mc.scan(value, zoo.random_ids(1, 60))


# -- the basis ------------------------------------------------------------------------------------


def test_results_of_two_bases_are_not_compared(neo):
    """Folding LayerNorm into the weights changes what ablating a head or editing a weight means."""
    paragraphs = zoo.mixed(neo)
    quiet = {"progress": False}
    raw = mc.ablate_heads(neo, paragraphs, **quiet)
    assert raw.correlation(raw) == pytest.approx(1)
    assert -1 <= raw.correlation(mc.ablate_heads(neo, paragraphs, mode="mean", **quiet)) <= 1
    made = mc.unlearn(
        neo, paragraphs[:3], paragraphs[4:], recipe=Recipe(steps=1), kl_budget=None, **quiet
    )
    folded_model = zoo.bridge("gpt_neo")
    folded_model.enable_compatibility_mode(disable_warnings=True)
    folded = mc.ablate_heads(folded_model, paragraphs, **quiet)
    for pair in ((raw, folded), (folded, raw)):
        with pytest.raises(InputError, match=r"^other: measured in the (raw|folded) basis; the"):
            pair[0].correlation(pair[1])
    with (
        pytest.raises(InputError, match=r"in the folded basis; this edit was made in the raw"),
        made.apply(folded_model),
    ):
        pass
    for call in (
        lambda: edit_divergence(folded_model, made, paragraphs),
        lambda: evaluate_edit(folded_model, made, paragraphs[:3], paragraphs[4:], **quiet),
        lambda: recovery_curve(folded_model, made, paragraphs[:3], paragraphs[4:], **quiet),
    ):
        with pytest.raises(InputError, match="in the folded basis"):
            call()


def test_rank_correlation():
    provenance = Provenance({"basis": "raw"}, {}, {}, {})

    def score(*rows):
        return ScoreMap("x", "nats/token", torch.tensor(rows), provenance)

    first = score([1.0, 2.0], [3.0, 4.0])
    assert first.correlation(score([1.0, 4.0], [9.0, 16.0])) == pytest.approx(1)
    assert first.correlation(score([4.0, 3.0], [2.0, 1.0])) == pytest.approx(-1)
    # Spearman's 1 - 6 sum(d^2) / (n (n^2 - 1)) by hand: d = 1, 1, 0, 0
    assert first.correlation(score([2.0, 1.0], [3.0, 4.0])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert first.correlation(score([float("nan"), 1.0], [2.0, 3.0])) == pytest.approx(1)
    assert math.isnan(first.correlation(score([1.0, 1.0], [1.0, 1.0])))
    with pytest.raises(InputError, match=r"^other: \(1, 2\) by head; compare with one of \(2, 2\)"):
        first.correlation(score([1.0, 2.0]))
