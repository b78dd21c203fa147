"""Models in shards, in the type of their files, over several devices; GGUF files read once."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.models.devices import refuse_offloaded
from memcircuits.models.gguf import parsed_once
from memcircuits.models.loading import as_bridge, load_model
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return zoo.save("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


# -- shards and types -----------------------------------------------------------------------------


def test_a_model_in_shards_is_the_model_in_one_file(folder, tmp_path):
    zoo.hf_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    zoo.tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole, sharded = (load_model(path, device="cpu") for path in (folder, tmp_path))
    assert adapt(sharded).fingerprint() == adapt(whole).fingerprint()


def test_a_shard_that_is_missing_is_named(tmp_path):
    zoo.hf_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    zoo.tokenizer().save_pretrained(tmp_path)
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match=r"it cannot be loaded|lack"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_type_of_the_files(tmp_path, dtype):
    zoo.hf_model("llama").to(dtype).save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    assert adapt(load_model(tmp_path, device="cpu", dtype="auto")).dtype == dtype
    assert adapt(load_model(tmp_path, device="cpu")).dtype == torch.float32


# -- device maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_on_one_device(folder, device_map):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("this map would choose the GPU")
    model, expected = load_model(folder, device_map=device_map), load_model(folder, device="cpu")
    given = zoo.mixed(expected)
    first, second = (mc.scan(m, given, progress=False) for m in (model, expected))
    assert torch.equal(first.nll, second.nll)
    assert first.provenance.model["fingerprint"] == second.provenance.model["fingerprint"]


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "disk"}, "device_map: disk; some weights would be fetched"),
        ({"model": "cpu", "lm_head": "disk"}, "device_map: cpu, disk; some weights"),
        ({"model": 0, "lm_head": "cpu"}, "device_map: 0, cpu; some weights"),
        ("everywhere", "device_map: 'everywhere'; choose one of auto, balanced"),
        ({}, "device_map: {}; choose auto"),
        (3, "device_map: 3; choose auto"),
    ],
)
def test_device_maps_that_cannot_be(folder, device_map, message):
    with pytest.raises(InputError, match=message):
        load_model(folder, device_map=device_map)


def test_a_device_beside_a_map(folder):
    with pytest.raises(InputError, match=r"device_map: 'auto'; give it without device='cpu'"):
        load_model(folder, device_map="auto", device="cpu")


def test_weights_on_disk_are_refused(tmp_path):
    """As a map made by accelerate leaves them when memory is short."""
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.disk_offload(zoo.hf_model("llama"), str(tmp_path), torch.device("cpu"))
    with pytest.raises(InputError, match=r"weights would be fetched whenever they are used"):
        refuse_offloaded(offloaded)


def split_over(devices, name="llama"):
    """A bridge whose blocks lie on the devices in turn, as accelerate splits a model."""
    from accelerate import dispatch_model

    hf_model = zoo.shaken(zoo.hf_model(name))
    n = hf_model.config.num_hidden_layers
    places = {f"model.layers.{i}": devices[i * len(devices) // n] for i in range(n)}
    edges = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    edges |= {"model.norm": devices[-1], "lm_head": devices[-1]}
    hf_model = dispatch_model(hf_model, places | edges, main_device=devices[0])
    return as_bridge(hf_model, zoo.tokenizer(), name="tiny-llama")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("analysis", matrix.ANALYSES)
def test_a_model_over_two_devices(analysis):
    model, given = split_over(["cuda:0", "cuda:1"]), matrix.paragraphs("llama")
    assert {p.device.index for p in model.parameters()} == {0, 1}
    measure = matrix.ANALYSES[analysis].measure
    expected = measure(matrix.model("llama", "Bridge raw"), given)
    assert matrix.difference(measure(model, given), expected, False) < 1e-3


# -- GGUF -----------------------------------------------------------------------------------------


def gguf_file(path, n_tokens=300):
    """A tiny Llama with random weights, as llama.cpp stores it."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 64,
        "head_count": 4,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(n_tokens)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"word{i}" for i in range(n_tokens - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_tokens)
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * (n_tokens - 259))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (n_tokens, 32), "output": (n_tokens, 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{k}": (32, 32) for k in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{k}": (16, 32) for k in "kv"}
        shapes |= {f"blk.{i}.ffn_{k}": (64, 32) for k in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.{k}_norm": (32,) for k in ("attn", "ffn")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_opened_and_parsed_once(tmp_path, monkeypatch):
    import gguf
    from transformers import modeling_gguf_pytorch_utils as utilities

    path = gguf_file(tmp_path / "tiny.gguf")
    opened, parsed = [], []
    reader, parse = gguf.GGUFReader, utilities._gguf_parse_value

    def counted_reader(*args):
        opened.append(args)
        return reader(*args)

    def counted_parse(value, kind):
        parsed.append(bytes(value))
        return parse(value, kind)

    monkeypatch.setattr(gguf, "GGUFReader", counted_reader)
    monkeypatch.setattr(utilities, "_gguf_parse_value", counted_parse)
    model = load_model(path, device="cpu")
    assert len(opened) == 1
    assert sum(value == b"word7" for value in parsed) == 1
    assert gguf.GGUFReader is counted_reader
    assert utilities._gguf_parse_value is counted_parse

    from transformers import AutoModelForCausalLM

    monkeypatch.undo()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    ids = torch.randint(259, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert torch.allclose(adapt(model).forward(ids), expected, atol=1e-4)


def test_two_files_of_one_name_are_told_apart(tmp_path):
    """The header of another file in the same place is read anew."""
    names = []
    for n_tokens in (300, 310):
        model = load_model(gguf_file(tmp_path / "tiny.gguf", n_tokens), device="cpu")
        names.append(adapt(model).d_vocab)
    assert names == [300, 310]


def test_readers_are_put_back_after_an_exception():
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader

    def interrupted():
        with parsed_once():
            assert gguf.GGUFReader is not reader
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gguf.GGUFReader is reader
