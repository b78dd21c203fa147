"""Whatever state the caller's objects and torch are in, the numbers are the model's, and it stays.

The state is that of modules outside the Bridge (training flags), of torch (inference mode,
autocast, default type and device), of the model (type, attention) and of hooks.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.editing.planting import plant
from memcircuits.models.architecture import every_module
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt, validate_model
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.calls import CALLS, edit_of

NAME = "gpt_neo"


def boot(hf_model):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "tiny", hf_model=hf_model, tokenizer=zoo.tokenizer(), dtype=hf_model.dtype
    )


def with_dropout(hf_model, p=0.5):
    for module in hf_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
    return hf_model


# -- training mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "neox", "opt"])
@pytest.mark.parametrize("first", ["eval", "train"])
def test_dropout_outside_the_bridge(name, first):
    """After `hf.train()` the numbers are those of the evaluated model, also in the first use."""
    hf_model = with_dropout(zoo.hf_model(name))
    model = boot(hf_model)
    paragraphs = zoo.mixed(zoo.bridge(name))
    expected = mc.scan(zoo.bridge(name), paragraphs, progress=False)
    assert expected.is_memorized.sum() >= 4
    if first == "eval":
        mc.scan(model, paragraphs, progress=False)
    hf_model.train()
    flags = [module.training for module in every_module(model)]
    for _ in range(2):
        result = mc.scan(model, paragraphs, progress=False)
        assert torch.equal(result.em, expected.em)
        assert torch.allclose(result.nll, expected.nll, atol=1e-5)
    assert [module.training for module in every_module(model)] == flags
    assert hf_model.training


def test_functional_dropout_that_reads_the_training_flag_of_the_root():
    hf_model = zoo.hf_model("llama")
    forward = hf_model.lm_head.forward

    def dropping(x):
        return forward(torch.nn.functional.dropout(x, 0.5, training=hf_model.training))

    hf_model.lm_head.forward = dropping
    model = boot(hf_model)
    paragraphs = zoo.reciting(zoo.bridge("llama"))
    hf_model.train()
    assert mc.scan(model, paragraphs, progress=False).em.tolist() == [12] * 4
    assert hf_model.training


def test_training_flags_come_back_after_ctrl_c():
    hf_model = with_dropout(zoo.hf_model("gpt2"))
    model = boot(hf_model)
    adapt(model)
    hf_model.train()
    hf_model.transformer.drop.eval()
    flags = [module.training for module in every_module(model)]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = hf_model.transformer.drop.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mc.parameter_gradients(model, zoo.random_ids(2, 60), progress=False)
    handle.remove()
    assert [module.training for module in every_module(model)] == flags


# -- the state of torch ---------------------------------------------------------------------------


@contextlib.contextmanager
def changed(setter, value, back):
    setter(value)
    try:
        yield
    finally:
        setter(back)


STATES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "default float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),
}


def torch_state():
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_device(),
    )


@functools.cache
def usual(analysis):
    return matrix.ANALYSES[analysis].measure(matrix.model(NAME, "Bridge raw"), paragraphs())


@functools.cache
def paragraphs():
    matrix.twins(matrix.paragraphs(NAME))
    return matrix.paragraphs(NAME)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("analysis", matrix.ANALYSES)
def test_analyses_do_not_depend_on_the_state_of_torch(analysis, state):
    model, expected = matrix.model(NAME, "Bridge raw"), usual(analysis)
    with STATES[state]():
        before = torch_state()
        result = matrix.ANALYSES[analysis].measure(model, paragraphs())
        assert torch_state() == before
    assert matrix.difference(result, expected, False) <= 1e-6


@pytest.mark.parametrize("call", sorted(CALLS.keys() - matrix.ANALYSES.keys()))
def test_every_other_call_runs_inside_inference_mode(call):
    model = matrix.model(NAME, "Bridge raw")
    paragraphs()
    with torch.inference_mode():
        before = torch_state()
        CALLS[call](model, NAME)
        assert torch_state() == before


def test_a_default_device():
    """Tensors made on the way would have no numbers on this device."""
    model, given = matrix.model(NAME, "Bridge raw"), paragraphs()
    expected = mc.scan(model, given, progress=False).nll
    gradients = mc.parameter_gradients(model, given, progress=False)
    with torch.device("meta"):
        assert torch.equal(mc.scan(model, given, progress=False).nll, expected)
        result = mc.parameter_gradients(model, given, progress=False)
    assert all(torch.equal(result.values[name], gradients.values[name]) for name in result.values)


def test_paragraphs_made_inside_inference_mode():
    model = matrix.model(NAME, "Bridge raw")
    with torch.inference_mode():
        made = mc.Paragraphs(paragraphs().ids.clone(), paragraphs().n_prefix)
    result = mc.parameter_gradients(model, made, progress=False)
    expected = mc.parameter_gradients(model, paragraphs(), progress=False)
    assert torch.equal(result.values["W_O"], expected.values["W_O"])


def test_weights_made_inside_inference_mode(tmp_path):
    """They have no gradients: a scan works, gradients and edits name the reason."""
    with torch.inference_mode():
        model = boot(zoo.shaken(zoo.hf_model(NAME)))
    assert next(model.parameters()).is_inference()
    result = mc.scan(model, paragraphs(), progress=False)
    expected = mc.scan(matrix.model(NAME, "Bridge raw"), paragraphs(), progress=False)
    assert torch.equal(result.em, expected.em)
    mc.ablate_heads(model, paragraphs(), progress=False)
    edit = edit_of(matrix.model(NAME, "Bridge raw"), NAME)
    for call in (
        lambda: mc.parameter_gradients(model, paragraphs(), progress=False),
        lambda: mc.unlearn(model, paragraphs()[:3], paragraphs()[3:], progress=False),
        lambda: plant(model, paragraphs()[:3], where="L0H1", control=paragraphs()[3:]),
        lambda: edit.apply(model).__enter__(),
    ):
        with pytest.raises(UnsupportedModel, match=r"made inside torch\.inference_mode\(\)"):
            call()
    zoo.save(NAME, tmp_path)
    with torch.inference_mode():  # those of `load_model` can be differentiated
        loaded = mc.load_model(tmp_path, device="cpu")
    mc.parameter_gradients(loaded, paragraphs(), progress=False)


# -- type, attention, basis -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_type_after_use(dtype):
    given = zoo.mixed(zoo.bridge("llama"))
    model = boot(zoo.hf_model("llama"))
    mc.ablate_heads(model, given, progress=False)
    first = mc.scan(model, given, progress=False).provenance.model
    model.to(dtype)
    booted = as_bridge(zoo.hf_model("llama").to(dtype), zoo.tokenizer(), name="tiny")
    effects, expected = (mc.ablate_heads(m, given, progress=False) for m in (model, booted))
    assert torch.allclose(effects.values, expected.values, atol=1e-6)
    assert effects.provenance.model["dtype"] == str(dtype).removeprefix("torch.")
    assert validate_model(model).dtype == str(dtype).removeprefix("torch.")
    assert effects.provenance.model["fingerprint"] != first["fingerprint"]
    assert effects.provenance.model["fingerprint"] == expected.provenance.model["fingerprint"]
    model.to(torch.float32)
    assert adapt(model).dtype == torch.float32


def test_another_attention_implementation_after_use():
    given = zoo.mixed(zoo.bridge("llama"))
    hf_model = zoo.hf_model("llama")
    model = boot(hf_model)
    before = mc.ablate_heads(model, given, progress=False)
    adapter = adapt(model)
    hf_model.config._attn_implementation = "sdpa"
    assert adapt(model) is not adapter
    after = mc.ablate_heads(model, given, progress=False)
    assert torch.allclose(after.values, before.values, atol=1e-5)


def test_folded_after_use():
    model = zoo.bridge("gpt2")
    given = zoo.mixed(model)
    mc.ablate_heads(model, given, progress=False)
    model.enable_compatibility_mode(disable_warnings=True)
    folded = mc.ablate_heads(model, given, progress=False)
    assert folded.provenance.basis == "folded"
    fresh = zoo.bridge("gpt2")
    fresh.enable_compatibility_mode(disable_warnings=True)
    assert torch.equal(folded.values, mc.ablate_heads(fresh, given, progress=False).values)


def test_the_name_stays_and_nothing_is_tried_twice():
    model = zoo.bridge("llama")
    adapter = adapt(model)
    for _ in range(3):
        mc.scan(model, zoo.random_ids(1, 60), progress=False)
        mc.ablate_heads(model, zoo.random_ids(1, 60), progress=False)
        assert adapt(model) is adapter
        assert adapt(adapter) is adapter
    model.to(torch.float64)
    assert adapt(adapter) is not adapter
    assert adapt(adapter) is adapt(model)
    assert adapt(model).name == "tiny-llama"


# -- hooks ----------------------------------------------------------------------------------------


def steer(tensor, hook=None):
    return tensor + 3.0


def by_hook_point(model):
    model.add_hook("blocks.1.hook_resid_pre", steer, is_permanent=True)


def by_module(model):
    model.original_model.get_submodule("model.norm").register_forward_hook(
        lambda module, args, out: out * 2
    )


def before_module(model):
    model.blocks[2].register_forward_pre_hook(functools.partial(lambda k, module, args: None, 1))


def by_another_forward(model):
    attention = model.blocks[0].attn
    old = attention.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return old(*args, **kwargs)

    vars(attention)["forward"] = forward


@pytest.mark.parametrize("install", [by_hook_point, by_module, before_module, by_another_forward])
def test_hooks_of_the_caller_stand_in_the_provenance(install, tmp_path):
    model = zoo.bridge("llama")
    given = zoo.reciting(model)
    clean = mc.scan(model, given, progress=False)
    assert clean.provenance.model["hooks"] == []
    assert clean.provenance.notes == ()
    install(model)
    result = mc.scan(model, given, progress=False)
    effects = mc.ablate_heads(model, given, progress=False)
    assert len(result.provenance.model["hooks"]) == 1
    assert result.provenance != clean.provenance
    assert "hooks of the caller" in repr(result)
    assert "hooks of the caller" in result._repr_html_()
    (note,) = [note for note in effects.notes if "hooks of the caller" in note]
    assert type(effects).load(effects.save(tmp_path / "effects.safetensors")).notes == effects.notes
    assert note in repr(effects)


def test_a_hook_on_every_module():
    model = zoo.bridge("llama")
    adapt(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert adapt(model).foreign_hooks == ["every module: <lambda>"]
    finally:
        handle.remove()
    assert adapt(model).foreign_hooks == []


def test_hooks_of_the_libraries_are_not_the_callers():
    for name in zoo.ARCHITECTURES:
        model = zoo.bridge(name)
        mc.attention_view(model, zoo.mixed(model)[0])
        model.run_with_cache(zoo.random_ids(1, 5))
        assert adapt(model).foreign_hooks == []
