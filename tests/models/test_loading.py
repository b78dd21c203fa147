"""Models from folders, GGUF files and memory; what is refused, and with which words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import memcircuits as mc
from memcircuits.base.errors import InputError, UnsupportedModel
from memcircuits.models.loading import as_bridge, load_model, resolve_device
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return zoo.save("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the model folder that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "tiny-llama"))


def change(folder: Path, file: str, **settings):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# -- what loads -----------------------------------------------------------------------------------


def test_folder(original):
    model = load_model(original)
    ids = zoo.random_ids(2, 20)
    adapter = adapt(model)
    with adapter.preserving_state():
        result = adapter.forward(ids)
        expected = zoo.hf_model("llama")(input_ids=ids, use_cache=False).logits
    assert torch.allclose(result, expected, atol=1e-5)
    assert not model.training
    assert (adapter.name, adapter.revision, adapter.dtype) == ("tiny-llama", None, torch.float32)
    assert adapter.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert mc.Paragraphs.from_texts(
        ["<1> <2> <3> <4>"], model, n_prefix=2, n_continuation=2
    ).ids.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("written", ["{folder}/", "{folder}/../tiny-llama", "{folder}/."])
def test_the_name_of_a_folder_is_its_own_however_it_is_written(original, written):
    model = load_model(written.format(folder=original))
    assert adapt(model).label == "tiny-llama"


@pytest.mark.parametrize("name", ["with space", "ünïcödé-模型", "a'b\"c", "-rf", "100%", "x;y&z"])
def test_odd_folder_names(original, tmp_path, name):
    path = Path(shutil.copytree(original, tmp_path / name))
    assert adapt(load_model(path)).label == name


def test_relative_folder_that_looks_like_a_hub_name(original, monkeypatch):
    monkeypatch.chdir(original.parent.parent)
    assert adapt(load_model(f"{original.parent.name}/{original.name}")).label == "tiny-llama"


def test_names_on_the_hub_keep_their_owner(neo):
    adapter = adapt(zoo.bridge("gpt2"))
    adapter.name = "EleutherAI/gpt-neo-125m"
    assert adapter.label == "EleutherAI/gpt-neo-125m"
    for path in ("/srv/models/private", "C:\\models\\private", "./models/private"):
        adapter.name = path
        assert adapter.label == "private"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
def test_half_precision(original, dtype):
    model = load_model(original, dtype=dtype)
    assert adapt(model).dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert mc.scan(model, zoo.random_ids(2, 60), progress=False).finite.all()


def test_a_model_in_memory_that_does_not_name_its_class():
    """OLMo and others cannot be told from `model_type` alone."""
    import transformers

    _, settings = zoo.ARCHITECTURES["llama"]
    config = transformers.Olmo2Config(**settings)
    assert not config.architectures
    model = transformers.AutoModelForCausalLM.from_config(config)
    result = as_bridge(zoo.shaken(model), zoo.tokenizer(), name="tiny-olmo2")
    assert mc.ablate_heads(result, zoo.random_ids(2, 60), progress=False).values.abs().max() > 0


# -- names on the hub -----------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
HUB = """
import json, sys
from memcircuits.models.registry import adapt
from memcircuits.base.errors import InputError
from memcircuits.models.loading import load_model
outcomes = []
for revision in json.loads(sys.argv[1]):
    try:
        model = load_model("someone/tiny", revision=revision)
        adapter = adapt(model)
        outcomes.append([adapter.label, adapter.revision, adapter.fingerprint()])
    except InputError as error:
        outcomes.append(str(error))
print(json.dumps(outcomes))
"""


def test_a_name_on_the_hub_at_a_revision(tmp_path):
    """Out of a cache like the hub's own, without a network: a process of its own reads it."""
    cache = tmp_path / "hub" / "models--someone--tiny"
    prints = {}
    for seed, (name, commit) in enumerate(COMMITS.items()):
        snapshot = zoo.save("llama", cache / "snapshots" / commit, seed=seed)
        model = load_model(snapshot)
        prints[name] = adapt(model).fingerprint()
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    assert prints["main"] != prints["v2"]
    asked = [None, "main", "v2", COMMITS["v2"], "v3", "c" * 40]
    outcome = subprocess.run(
        [sys.executable, "-c", HUB, json.dumps(asked)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *known, absent, unknown = json.loads(outcome.stdout)
    expected = ["main", "main", "v2", "v2"]
    assert known == [
        ["someone/tiny", revision, prints[name]]
        for revision, name in zip(asked, expected, strict=False)
    ]
    for message in (absent, unknown):
        assert message.startswith("model: someone/tiny; it cannot be loaded")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "../up", "no such thing", "a\nb", "x" * 5000, "hub/na me", "é/é", "a\0b", "~/x"],
    ids=lambda name: repr(name[:12]),
)
def test_names_that_are_no_folder_and_not_on_the_hub(name):
    with pytest.raises(InputError, match=r"^model: "):
        load_model(name)


def test_a_name_on_the_hub_without_a_network():
    with pytest.raises(InputError, match=r"^model: nobody/nothing; it cannot be loaded"):
        load_model("nobody/nothing")


def test_missing_gguf():
    with pytest.raises(InputError, match=r"^model: no\.gguf; there is no such file"):
        load_model("/nowhere/no.gguf")


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=rf"^model: {tmp_path.name}; .* no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"auto_map"', "[" * 10_000, "\xff\xfe"])
def test_unreadable_configuration(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"^model: tiny-llama; its config.json"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "no-such-type"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"hidden_size": 64},
        {"hidden_size": "many"},
        {"num_hidden_layers": -1},
        {"vocab_size": 7},
        {"hidden_act": "no-such-function"},
        {"torch_dtype": "float7", "dtype": "float7"},
    ],
)
def test_configurations_that_do_not_fit(folder, settings):
    change(folder, "config.json", **settings)
    with pytest.raises(InputError, match=r"^model: tiny-llama"):
        load_model(folder)


def test_a_missing_file_of_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^model: tiny-llama; it cannot be loaded"):
        load_model(folder)


def test_weights_that_the_file_lacks_are_not_made_up(folder):
    """transformers would fill them with random numbers and only warn."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its files lack 1 weights, model\.layers\.1\.self_attn"):
        load_model(folder)


def test_not_finite_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"^model: tiny-llama; .*not finite"):
        load_model(folder)


def test_a_missing_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match=r"^model: tiny-llama; it cannot be loaded"):
        load_model(folder)


def encoder(transformers, settings):
    return transformers.BertForMaskedLM(transformers.BertConfig(**settings))


def encoder_decoder(transformers, settings):
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64}
    config = transformers.T5Config(vocab_size=101, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def state_space(transformers, settings):
    config = transformers.MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (encoder, "would be wrong"),
        (encoder_decoder, "no stack of decoder blocks"),
        (state_space, r"no blocks\.0\.attn\.hook_z"),
    ],
)
def test_architectures_that_cannot_be_supported_say_why(make, reason):
    import transformers

    model = make(transformers, zoo.ARCHITECTURES["llama"][1])
    with pytest.raises(UnsupportedModel, match=rf"^model: tiny.*{reason}"):
        as_bridge(zoo.shaken(model), zoo.tokenizer(), name="tiny")


# -- devices and types ----------------------------------------------------------------------------


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == "cpu"  # never mps unless it is asked for
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("mps") == "mps"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"^device: {device}; torch finds no such device"):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    for device in ("cuda:2", "cuda:x", "cuda:", "cuda:-1", "cpu:3", "tpu", "", "CUDA"):
        with pytest.raises(InputError, match=r"^device: "):
            resolve_device(device)


@pytest.mark.parametrize("dtype", ["float7", "float64", "", torch.int8])
def test_types(original, dtype):
    with pytest.raises(InputError, match=r"^dtype: .*choose one of auto, bfloat16, float16"):
        load_model(original, dtype=dtype)
