"""Matrices behind wrappers: understood by trying them, or refused by name with the way on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter
from memcircuits.models.layout import is_plain, stored_matrix, tried_layout
from memcircuits.models.registry import adapt, validate_model
from memcircuits.models.validation import run_checks
from memcircuits.models.weight_checks import misplaced_gradient
from tests.helpers import models as zoo

AVERAGES = ("batch", "paragraph")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def boot(hf_model):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "tiny", hf_model=hf_model.eval(), tokenizer=zoo.tokenizer(), dtype=hf_model.dtype
    )


def lora(targets, name="llama", **settings):
    """A model with a trained adapter; the same one every time."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=targets, lora_dropout=0.3, **settings)
        return peft.get_peft_model(zoo.hf_model(name), config).eval()


def paragraphs(model):
    return zoo.mixed(model, n=2)


# -- LoRA -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged():
    return boot(lora(EVERY).merge_and_unload())


@pytest.mark.parametrize("state", ["unmerged", "merged in place", "in training"])
def test_lora_gives_the_numbers_of_the_merged_model(merged, state):
    peft_model = lora(EVERY)
    if state == "merged in place":
        peft_model.merge_adapter()
    model = boot(peft_model.get_base_model())
    if state == "in training":
        peft_model.train()
    given = paragraphs(merged)
    result, expected = (mc.scan(m, given, progress=False) for m in (model, merged))
    assert torch.equal(result.em, expected.em)
    assert expected.is_memorized.any()
    for average in AVERAGES:
        gradients, wanted = (
            mc.parameter_gradients(m, given, average=average, progress=False).values
            for m in (model, merged)
        )
        assert gradients.keys() == wanted.keys()
        for component, values in gradients.items():
            assert torch.allclose(values, wanted[component], rtol=1e-3, atol=1e-7), component
    effects, wanted = (mc.ablate_heads(m, given, progress=False).values for m in (model, merged))
    assert torch.allclose(effects, wanted, atol=1e-4)
    for ours, theirs in zip(adapt(model).weights(), adapt(merged).weights(), strict=True):
        assert torch.allclose(ours.matrix, theirs.values, atol=1e-5)
    assert peft_model.training == (state == "in training")


def test_an_edit_of_a_head_changes_its_rows_only(merged):
    peft_model = lora(EVERY)
    model = boot(peft_model.get_base_model())
    given = paragraphs(merged)
    edit = mc.unlearn(
        model,
        given[:1],
        given[2:],
        heads=["L0H1"],
        components=("W_Q",),
        fraction=0.05,
        kl_budget=math.inf,
        progress=False,
    )
    layer = peft_model.get_base_model().model.layers[0].self_attn.q_proj.original_component
    before = layer.base_layer.weight.detach().clone()
    with edit.apply(model):
        rows = (layer.base_layer.weight.detach() != before).any(1).nonzero()[:, 0].tolist()
    assert rows
    assert set(rows) <= set(range(8, 16))
    assert torch.equal(layer.base_layer.weight.detach(), before)


def test_switches_of_adapters_belong_to_the_fingerprint():
    peft_model = lora(["q_proj"])
    model = boot(peft_model.get_base_model())
    digits = {"unmerged": adapt(model).fingerprint()}
    with peft_model.disable_adapter():
        digits["disabled"] = adapt(model).fingerprint()
    assert adapt(model).fingerprint() == digits["unmerged"]
    layer = model.blocks[1].attn.q.original_component
    layer.scaling["default"] *= 2
    digits["scaled"] = adapt(model).fingerprint()
    layer.scaling["default"] /= 2
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] += 1
    digits["trained"] = adapt(model).fingerprint()
    assert len(set(digits.values())) == len(digits)


def test_lora_on_embeddings():
    given = paragraphs(boot(lora(["embed_tokens"]).merge_and_unload()))
    models = [boot(lora(["embed_tokens"]).get_base_model())]
    models.append(boot(lora(["embed_tokens"]).merge_and_unload()))
    first, second = (mc.scan(m, given, progress=False).nll for m in models)
    assert torch.allclose(first, second, atol=1e-5)
    drawn = [
        mc.perturb_prefix(m, given, replacement="neighbor", progress=False).replacements
        for m in models
    ]
    assert torch.equal(*drawn)
    plain = mc.perturb_prefix(
        zoo.bridge("llama"), given, replacement="neighbor", progress=False
    ).replacements
    assert not torch.equal(plain, drawn[0])


@pytest.mark.parametrize(
    ("settings", "targets"),
    [({"use_dora": True}, ["v_proj"]), ({"use_dora": True}, ["down_proj"])],
)
def test_what_rescales_the_sum_is_refused(settings, targets):
    model = boot(lora(targets, **settings).get_base_model())
    with pytest.raises(UnsupportedModel, match=r"peft's Linear does more .*merge_and_unload\(\)"):
        adapt(model)
    adapt(boot(lora(targets, **settings).merge_and_unload()))


def test_ia3_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False
    )
    model = boot(peft.get_peft_model(zoo.hf_model("llama"), config).get_base_model())
    with pytest.raises(UnsupportedModel, match=r"W_K of block 0: .*merge_and_unload\(\)"):
        adapt(model)


@pytest.mark.parametrize(("name", "target"), [("gpt2", "c_attn"), ("neox", "query_key_value")])
def test_lora_on_a_fused_matrix_would_be_left_out(name, target):
    """TransformerLens splits the fused matrix without it: every number would be another model's."""
    settings = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = boot(lora([target], name, **settings).get_base_model())
    with pytest.raises(UnsupportedModel, match=r"leaves out what peft's Linear adds.*merge_and_un"):
        adapt(model)
    adapt(boot(lora([target], name, **settings).merge_and_unload()))


# -- other wrappers -------------------------------------------------------------------------------


def replaced(make, name="llama"):
    """A model of which one matrix is applied by what `make` makes of its module."""
    hf_model = zoo.hf_model(name)
    attention = hf_model.model.layers[1].self_attn
    attention.q_proj = make(attention.q_proj)
    return boot(hf_model)


class Quantized(nn.Module):
    """Eight-bit weights with one scale, as quantizing libraries hold them."""

    def __init__(self, linear, dtype=torch.int8):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 100
        stored = (linear.weight.detach() / self.scale).round().to(dtype)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


class Packed(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.qweight.T


class Halved(nn.Module):
    """Applies half of what it stores."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.weight.T / 2


class Transposed(nn.Module):
    """A square matrix that no class name tells the layout of."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())

    def forward(self, x):
        return x @ self.weight


class Scaled(nn.Module):
    def forward(self, w):
        return 0.5 * w


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Scaled())
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Quantized, r"Quantized stores it as int8; .*dequantize\(\)"),
        (lambda linear: Quantized(linear, torch.uint8), "stores it as uint8"),
        (Packed, r"Packed holds no matrix of its own; .*dequantize\(\)"),
        (Halved, "Halved does more with it than a matrix product"),
        (parametrized, r"holds no matrix of its own; call .*remove_parametrizations"),
        (parametrizations.weight_norm, r"call .*remove_parametrizations"),
    ],
)
def test_wrappers_that_are_not_understood_are_named(make, message):
    with pytest.raises(UnsupportedModel, match=rf"W_Q of block 1: .*{message}") as caught:
        adapt(replaced(make))
    assert "\n" not in str(caught.value)


def test_the_layout_of_an_unknown_class_is_tried():
    plain, model = zoo.bridge("llama"), replaced(Transposed)
    given = paragraphs(plain)
    weight = adapt(model).weight(1, "W_Q")
    assert weight.layout == "in out"
    assert torch.equal(weight.values, adapt(plain).weight(1, "W_Q").values)
    for average in AVERAGES:
        gradients, expected = (
            mc.parameter_gradients(m, given, average=average, progress=False).values["W_Q"]
            for m in (model, plain)
        )
        assert torch.allclose(gradients, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (1, 5)])
def test_layouts(dtype, shape):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    for module, layout in ((nn.Linear(*shape), "out in"), (Conv1D(*shape), "in out")):
        module = module.to(dtype)
        parameter = stored_matrix(module, "m", "W")
        kept = parameter.detach().clone()
        assert tried_layout(module, parameter, "m", "W") == layout
        assert torch.equal(parameter, kept)
        assert module.weight is parameter
        assert is_plain(module)


# -- heads and blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["W_Q", "W_V", "W_in"])
def test_columns_in_another_order_are_noticed(monkeypatch, component):
    """For each component by itself: W_O alone would not show it."""
    import dataclasses

    model = zoo.bridge("llama")
    adapter = adapt(model)
    weight = Adapter.weight

    def rolled(self, layer, name):
        right = weight(self, layer, name)
        if name != component:
            return right
        axis = 0 if right.values.shape[0] > 1 else 2
        return dataclasses.replace(right, split=lambda t: right.split(t).roll(1, axis))

    resid = torch.randn(1, 8, adapter.d_model, generator=torch.Generator().manual_seed(0))
    assert misplaced_gradient(adapter, 1, resid) < 1e-5
    monkeypatch.setattr(Adapter, "weight", rolled)
    assert misplaced_gradient(adapter, 1, resid) > 0.1
    with pytest.raises(UnsupportedModel, match="changes another's output"):
        run_checks(adapter)


def test_blocks_that_share_a_matrix_are_refused():
    hf_model = zoo.hf_model("llama")
    layers = hf_model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModel, match="W_in of block 2 is the same parameter as W_in of"):
        adapt(boot(hf_model))


def test_frozen_and_tied_weights_are_measured_and_stay_so():
    hf_model = zoo.hf_model("gpt2")  # its unembedding is its embedding
    for parameter in hf_model.parameters():
        parameter.requires_grad_(False)
    model = boot(hf_model)
    flags = [parameter.requires_grad for parameter in model.original_model.parameters()]
    given = paragraphs(zoo.bridge("gpt2"))
    gradients = mc.parameter_gradients(model, given, progress=False).values
    expected = mc.parameter_gradients(zoo.bridge("gpt2"), given, progress=False).values
    assert all(torch.allclose(gradients[c], expected[c], rtol=1e-4) for c in expected)
    assert [p.requires_grad for p in model.original_model.parameters()] == flags
    assert not all(flags)


def test_checks_of_weights_are_in_the_report():
    assert validate_model(zoo.bridge("gpt2")).checks["weights of heads"] < 1e-5
