"""Objects and folders that are almost a model are refused with the call that makes one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import memcircuits as mc
from memcircuits.base.errors import InputError, UnsupportedModel
from tests.helpers import models as zoo

BOOT = r'TransformerBridge.boot_transformers\("my-model", hf_model={}, tokenizer=tokenizer\)'


def refusal(call):
    with pytest.raises(UnsupportedModel) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("call", [mc.load_model, lambda m: mc.scan(m, zoo.random_ids(1, 60))])
class TestObjects:
    def test_transformers(self, call):
        assert "boot_transformers" in refusal(lambda: call(zoo.hf_model("llama")))

    def test_peft(self, call):
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(zoo.hf_model("llama"), settings)
        assert "hf_model=model.merge_and_unload()" in refusal(lambda: call(model))

    def test_pipeline(self, call):
        import transformers

        made = transformers.pipeline(
            "text-generation", model=zoo.hf_model("llama"), tokenizer=zoo.tokenizer(), device="cpu"
        )
        assert "pass its .model (LlamaForCausalLM)" in refusal(lambda: call(made))

    def test_compiled(self, call):
        compiled = torch.compile(zoo.bridge("llama"))
        assert "pass its ._orig_mod (TransformerBridge)" in refusal(lambda: call(compiled))

    def test_data_parallel(self, call):
        wrapped = nn.DataParallel(zoo.bridge("llama"))
        assert "pass its .module (TransformerBridge)" in refusal(lambda: call(wrapped))


def test_the_call_that_is_named_makes_a_model():
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = zoo.hf_model("llama"), zoo.tokenizer()
    with pytest.raises(UnsupportedModel, match=BOOT.format("model")):
        mc.scan(model, zoo.random_ids(2, 60))
    made = TransformerBridge.boot_transformers("my-model", hf_model=model, tokenizer=tokenizer)
    result = mc.scan(made, zoo.random_ids(2, 60), progress=False)
    expected = mc.scan(zoo.bridge("llama"), zoo.random_ids(2, 60), progress=False)
    assert torch.allclose(result.nll, expected.nll, atol=1e-5)


def test_a_name():
    with pytest.raises(UnsupportedModel, match=r"model: 'gpt2'; .*load_model\('gpt2'\)"):
        mc.scan("gpt2", zoo.random_ids(1, 60))


@pytest.mark.parametrize("text", ['{"base_model_name_or_path": "/srv/secret/llama-7b"}', "{", "[]"])
def test_a_folder_with_an_adapter_alone(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"PEFT adapter of .*merge_and_unload") as caught:
        mc.load_model(tmp_path)
    assert "secret" not in str(caught.value)
    assert ("llama-7b" in str(caught.value)) == text.startswith('{"')


def opt_350m_like():
    """Projections around blocks whose norms come last, as in no other OPT."""
    import transformers

    _, settings = zoo.ARCHITECTURES["opt"]
    settings = settings | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**settings)).eval()


def test_an_architecture_whose_code_does_not_fit_is_one_line_and_exit_2(tmp_path: Path):
    opt_350m_like().save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "memcircuits", "info", str(tmp_path), "--quiet"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith(f"memcircuits: --model: {tmp_path.name}")
    assert "Traceback" not in outcome.stderr
    assert json.loads((tmp_path / "config.json").read_text())["do_layer_norm_before"] is False


@pytest.mark.parametrize("error", [ValueError, AssertionError, ZeroDivisionError, OSError])
def test_whatever_a_model_raises_when_it_is_tried(error):
    """An exception of any type says that the model is not supported, and which it was."""
    from transformer_lens.model_bridge import TransformerBridge

    from memcircuits.models.registry import adapt

    made = TransformerBridge.boot_transformers(
        "x", hf_model=zoo.hf_model("llama"), tokenizer=zoo.tokenizer()
    )

    def fail(*_):
        raise error("odd\nshape")

    made.blocks[0].register_forward_hook(fail)
    with pytest.raises(UnsupportedModel, match=rf"{error.__name__}: odd shape\); use another"):
        adapt(made)
