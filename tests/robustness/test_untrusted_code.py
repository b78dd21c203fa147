"""Nothing in a file of paragraphs, weights or a model's folder is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.cli import app
from memcircuits.models.loading import load_model
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

RAN = "it-ran"


class Evil:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / RAN
    yield path
    assert not path.exists(), "code from the file was run"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"ids": x}, lambda x: [torch.ones(2), x]])
def test_pickled_paragraphs_are_not_run(tmp_path, marker, wrap, legacy):
    path = tmp_path / "paragraphs.pt"
    torch.save(wrap(Evil(marker)), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"^paragraphs: paragraphs\.pt"):
        mc.Paragraphs.read(path)


def test_bare_pickle_is_not_run(tmp_path, marker):
    for ending in (".pt", ".npy", ".parquet", ".jsonl", ".csv", ".txt", ".jsonl.gz", ".jsonl.zst"):
        path = tmp_path / f"paragraphs{ending}"
        path.write_bytes(pickle.dumps(Evil(marker)))
        with pytest.raises(InputError):
            mc.Paragraphs.read(path, zoo.tokenizer())


def test_objects_in_arrays_are_not_run(tmp_path, marker):
    path = tmp_path / "paragraphs.npy"
    np.save(path, np.array([[Evil(marker)]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"^paragraphs: paragraphs\.npy"):
        mc.Paragraphs.read(path)


def test_pickled_weights_are_not_run(original, tmp_path, marker):
    folder = Path(shutil.copytree(original / "model", tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"^model: model; it cannot be loaded"):
        load_model(folder)


@pytest.fixture
def foreign(original, tmp_path, marker):
    """A folder that cannot be loaded without running the code in it."""
    folder = Path(shutil.copytree(original / "model", tmp_path / "foreign"))
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for module in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{module}.py").write_text(code)
    return folder


def settings(folder: Path, file: str, **changes) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def test_remote_code_is_refused(foreign):
    settings(foreign, "config.json", model_type="own", auto_map=MAP)
    with pytest.raises(InputError, match=r"^model: foreign; it brings its own code; pass trust_"):
        load_model(foreign)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc1234", "g" * 40, "A" * 40])
def test_remote_code_needs_a_pinned_revision(foreign, revision):
    settings(foreign, "config.json", model_type="own", auto_map=MAP)
    with pytest.raises(InputError, match=r"^revision: .*pinned commit \(40 hex digits\)"):
        load_model(foreign, trust_remote_code=True, revision=revision)


def test_code_beside_an_architecture_that_transformers_knows_is_ignored(foreign):
    settings(foreign, "config.json", auto_map=MAP)
    assert adapt(load_model(foreign)).architecture == "GPTNeoForCausalLM"


def test_tokenizer_code_is_not_run(foreign):
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    settings(foreign, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    try:
        load_model(foreign)  # with transformers' own class, or not at all; the marker tells
    except InputError as error:
        assert str(error).startswith("model: foreign; ")  # noqa: PT017


@pytest.mark.parametrize("command", ["scan", "heads", "info"])
def test_remote_code_on_the_command_line(foreign, command, tmp_path):
    """Refused without the option, and with it unless a commit is named."""
    texts = tmp_path / "any.jsonl"
    texts.write_text("")
    settings(foreign, "config.json", model_type="own", auto_map=MAP)
    model = [str(foreign)] if command == "info" else ["--model", str(foreign)]
    if command != "info":
        model += ["--paragraphs", str(texts)]
    for more, says in (
        ([], "--model: foreign; it brings its own code; pass --trust-remote-code"),
        (["--trust-remote-code"], "--revision: None; --trust-remote-code needs a pinned commit"),
        (
            ["--trust-remote-code", "--revision", "main"],
            "--revision: main; --trust-remote-code",
        ),
    ):
        result = CliRunner().invoke(app, [command, *model, *more])
        assert result.exit_code == 2
        assert f"memcircuits: {says}" in result.stderr
        assert "Traceback" not in result.output
