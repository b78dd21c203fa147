"""Spoiled folders and GGUF files of models: each loads or is refused by one clear error."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from memcircuits.base.errors import InputError
from memcircuits.models import loading
from tests.helpers import models as zoo
from tests.helpers.fuzz import COUNTS, VALUES, only_input_errors, spoil


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The smallest Llama, in a folder."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_spoiled_model_folders(tiny, tmp_path):
    draw = random.Random(2)
    folder = tmp_path / "tiny"
    folder.mkdir()
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    loaded = 0
    for turn in range(COUNTS["model folders"]):
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        if turn % 2:
            name = "config.json"
            settings = json.loads(files[name])
            for key in draw.sample(sorted(settings), 2):
                settings[key] = draw.choice(VALUES)
            spoiled = json.dumps(settings).encode()
        else:
            name = draw.choice(sorted(files))
            # Digits of the configuration stay: a billion layers is no malformed input.
            spoiled = files[name][: draw.randrange(len(files[name]))]
            spoiled = spoiled if name == "config.json" else spoil(files[name], draw)
        (folder / name).write_bytes(spoiled)
        with only_input_errors("model folders", (name, spoiled[:1500])):
            loading.load_model(folder)
            loaded += 1
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    assert 0 < loaded < COUNTS["model folders"]


def test_spoiled_gguf_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    raw = path.read_bytes()
    draw = random.Random(3)
    for turn in range(COUNTS["gguf files"]):
        # The counts in the first 24 bytes stay in most: with them the reader would run for hours.
        spoiled = raw[:24] + spoil(raw[24:], draw) if turn % 4 else raw[: draw.randrange(len(raw))]
        path.write_bytes(spoiled)
        with only_input_errors("gguf files", spoiled[:500]), pytest.raises(InputError):
            loading.load_model(path)
