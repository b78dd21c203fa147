"""Nothing untrusted runs, nothing is written where it was not asked for, nothing private leaks."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.benchmark import kinds
from memcircuits.cli import app
from memcircuits.core.errors import InputError
from memcircuits.core.io import read_safetensors
from memcircuits.models.loading import as_bridge, load_model
from memcircuits.models.registry import adapt
from memcircuits.results.result import Result
from tests.helpers import models as zoo
from tests.helpers.calls import CALLS
from tests.helpers.commands import known_options

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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny model, paragraphs of it with names that mean no good, and a ranking."""
    path = tmp_path_factory.mktemp("files")
    zoo.save("gpt_neo", path / "model")
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model, n=4)
    names = [
        "../../up",
        "/etc/x",
        "</script><script>alert(1)</script>",
        "a\nb",
        "ü",
        "",
        "\u202e",
        "😀",
    ]
    paragraphs = mc.Paragraphs(paragraphs.ids, paragraphs.n_prefix, tuple(names))
    many = paragraphs + mc.Paragraphs.from_tokens(zoo.random_ids(64, 22, seed=2), n_prefix=10)
    for file, given in (("paragraphs", paragraphs), ("many", many)):
        rows = [
            {"id": name, "ids": ids}
            for name, ids in zip(given.names, given.ids.tolist(), strict=True)
        ]
        (path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranking = mc.find_memorization_heads(model, paragraphs, draws=20, progress=False)
    ranking.save(path / "ranking.safetensors")
    return path


# -- files that want to be run --------------------------------------------------------------------


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


# -- safetensors that lie -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved result of each kind that a tiny model gives."""
    folder = tmp_path_factory.mktemp("saved")
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model)
    results = {
        "scan": mc.scan(model, paragraphs, progress=False),
        "ablation": mc.ablate_heads(model, paragraphs, progress=False),
        "gradients": mc.parameter_gradients(model, paragraphs, progress=False),
        "ranking": mc.find_memorization_heads(model, paragraphs, draws=20, progress=False),
    }
    for name, result in results.items():
        result.save(folder / f"{name}.safetensors")
    counts = torch.arange(zoo.D_VOCAB)
    mc.UnigramTable(counts, "counts").save(folder / "unigrams.safetensors")
    return folder


@pytest.mark.parametrize("name", ["scan", "ablation", "gradients", "ranking"])
def test_saved_results_come_back(saved, name):
    found = Result.load(saved / f"{name}.safetensors")
    again = found.save(saved / f"{name}-again.safetensors")
    assert again.read_bytes() == (saved / f"{name}.safetensors").read_bytes()


def test_every_kind_is_read_by_a_program_that_has_made_none(saved):
    """Reading imports what the file holds; nothing else has to be imported first."""
    program = (
        "import importlib, pkgutil, sys, memcircuits; from memcircuits.results import result as results\n"
        "results.Result.load(sys.argv[1])\n"
        "known = set(results.Result.types)\n"
        "for module in pkgutil.iter_modules(memcircuits.__path__):\n"
        "    module.name == '__main__' or importlib.import_module(f'memcircuits.{module.name}')\n"
        "assert known == set(results.Result.types), set(results.Result.types) - known\n"
    )
    command = [sys.executable, "-c", program, str(saved / "ranking.safetensors")]
    subprocess.run(command, check=True)


def lies(raw: bytes):
    """Headers that promise what the data does not hold."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    name = next(key for key in header if key != "__metadata__")
    entry = header[name]

    def packed(changed: object) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    yield struct.pack("<Q", 2**60) + raw[8:]
    yield struct.pack("<Q", size - 1) + raw[8:]
    yield packed([])
    yield packed({})
    yield packed(header | {name: entry | {"shape": [2**40]}})
    yield packed(header | {name: entry | {"shape": [-1]}})
    yield packed(header | {name: entry | {"dtype": "F7"}})
    yield packed(header | {name: entry | {"data_offsets": [0, 2**50]}})
    yield packed(header | {name: entry | {"data_offsets": [8, 0]}})
    yield packed({key: value for key, value in header.items() if key != name})


def lies_about_fields(raw: bytes):
    """Whole tensors, and a header from which no result can be made."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]

    def packed(changed: object) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    yield packed(header | {"__metadata__": {}})
    yield packed(header | {"__metadata__": {"schema": "memcircuits.scan/1", "fields": "{"}})
    yield packed(header | {"__metadata__": {"schema": "memcircuits.scan/1", "fields": "[1]"}})
    yield packed(header | {"__metadata__": {"schema": "memcircuits.scan/1", "fields": "{}"}})


@pytest.mark.parametrize("name", ["scan", "ablation", "gradients", "ranking", "unigrams"])
def test_damaged_results_are_refused(saved, tmp_path, name):
    raw = (saved / f"{name}.safetensors").read_bytes()
    draw = random.Random(0)
    cuts = [raw[: draw.randrange(len(raw))] for _ in range(10)]
    path = tmp_path / "damaged.safetensors"
    read = mc.UnigramTable.read if name == "unigrams" else Result.load
    for damaged in [b"", b"\0" * 8, *cuts, *lies(raw), *lies_about_fields(raw)]:
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged\.safetensors"):
            read(path)


def test_a_flipped_number_is_noticed(saved, tmp_path):
    """And a result that was saved before there were checksums is read."""
    from safetensors.torch import save_file

    path = tmp_path / "damaged.safetensors"
    raw = bytearray((saved / "ranking.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + length])["score"]["data_offsets"]
    raw[8 + length + start + 2] ^= 16
    path.write_bytes(raw)
    with pytest.raises(InputError, match="its content is not what was written"):
        Result.load(path)
    tensors, header = read_safetensors(saved / "ranking.safetensors")
    del header["sha256"]
    save_file(tensors, path, metadata=header)
    assert torch.equal(Result.load(path).score, Result.load(saved / "ranking.safetensors").score)


def test_damaged_weights_are_refused(original, tmp_path):
    folder = Path(shutil.copytree(original / "model", tmp_path / "model"))
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for damaged in (b"", raw[:100], raw[: len(raw) // 2], *lies(raw)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^model: model; "):
            load_model(folder)


@pytest.mark.parametrize("schema", ["0", "2", "99", "", "1.0", "x", "1/1"])
def test_results_of_another_schema_are_refused(saved, tmp_path, schema):
    from safetensors.torch import save_file

    tensors, header = read_safetensors(saved / "ranking.safetensors")
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=header | {"schema": f"memcircuits.ranking/{schema}"})
    with pytest.raises(InputError, match=r"^path: other\.safetensors; its schema is .*recompute"):
        Result.load(path)


def test_results_of_another_kind_are_refused(saved):
    from memcircuits.measure.scanning import Scan

    with pytest.raises(InputError, match="it holds no Scan"):
        Scan.load(saved / "ablation.safetensors")
    with pytest.raises(InputError, match="it holds no Result"):
        Result.load(saved / "unigrams.safetensors")
    with pytest.raises(InputError, match="there is no such file"):
        Result.load(saved / "missing.safetensors")


# -- where files go, and what they say ------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "ü/模", "../sideways", "-x", "a;b|c", "x" * 100, "..."])
def test_results_are_written_where_they_were_asked_for(saved, tmp_path, name):
    (tmp_path / "here").mkdir()
    result = Result.load(saved / "ablation.safetensors")
    path = result.save(tmp_path / "here" / name / "result.safetensors")
    assert path.is_file()
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.resolve() for p in written] == [path.resolve()]


def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    result = Result.load(saved / "ablation.safetensors")
    path = tmp_path / "result.safetensors"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def tree(*folders: Path) -> dict[Path, int]:
    found = (p for folder in folders for p in folder.rglob("*") if p.is_file())
    return {p: p.stat().st_mtime_ns for p in found}


COMMANDS = {
    "heads": ["heads", "--out", "{out}"],
    "heads as json": ["heads", "--json", "--out", "{out}"],
    "scan": ["scan"],
    "scan as json": ["scan", "--json"],
    "scan to disk": ["scan", "--out", "{out}"],
    "gradients": ["gradients", "--out", "{out}"],
    "patch": ["patch", "--max-paragraphs", "2", "--out", "{out}"],
    "perturb": ["perturb", "--out", "{out}"],
    "unlearn": ["unlearn", "--fraction", "0.1", "--out", "{out}"],
    "edit": ["edit", "--fraction", "0.3", "--kl-budget", "9", "--out", "{out}"],
    "plant": [
        *("plant", "--where", "L0.attn,L0.mlp,L1.mlp,L2H1", "--kl-budget", "9"),
        *("--out", "{out}", "--json"),
    ],
    "ablate": ["ablate", "--out", "{out}"],
    "attention": ["attention", "--rows", "0,2", "--out", "{out}"],
    "unigrams": ["unigrams", "build", "--out", "{out}/unigrams.safetensors"],
    "report": ["report", "{original}/ranking.safetensors", "--out", "{out}/report.html"],
    "bench": ["bench", "localize", "--out", "{out}", "--paragraphs", "{original}/many.jsonl"],
}


def named(arguments: list[str]) -> str:
    """The command of a command line."""
    pair = " ".join(arguments[:2])
    return pair if pair in known_options() else arguments[0]


def test_every_command_that_writes_is_among_them():
    run = {named(arguments) for arguments in COMMANDS.values() if "--out" in arguments}
    writing = {name for name, options in known_options().items() if "--out" in options}
    assert writing - run == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_write_inside_out_and_nothing_of_this_machine(
    original, tmp_path, monkeypatch, command
):
    home, work, out = tmp_path / "home", tmp_path / "work", tmp_path / "out ü"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "work"))
    monkeypatch.chdir(work)
    before = tree(tmp_path, original)
    # The benchmark's own numbers of trials take hours; a trial of two kinds writes the same files.
    monkeypatch.setattr(kinds, "N_TRIALS", {"block": 1, "null": 1})
    given = {
        "--model": original / "model",
        "--paragraphs": original / "paragraphs.jsonl",
        "--n-prefix": 10,
        "--n-continuation": 12,
    }
    arguments = [a.format(out=out, original=original) for a in COMMANDS[command]]
    for option in known_options()[named(arguments)]:
        if option in given and option not in arguments:
            arguments += [option, str(given[option])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    after = tree(tmp_path, original)
    new = [path for path in after if before.get(path) != after[path]]
    assert all(path.is_relative_to(out) for path in new)
    assert bool(new) == ("--out" in COMMANDS[command])
    told = result.stdout.encode() + b"".join(path.read_bytes() for path in new)
    for private in (str(tmp_path), str(original), str(Path.home()), os.getcwd()):
        assert private.encode() not in told
    for path in new:
        assert path.suffix != ".html" or b"<script>alert(1)" not in path.read_bytes()
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["scan", "heads", "info"])
def test_remote_code_on_the_command_line(foreign, command):
    """Refused without the option, and with it unless a commit is named."""
    settings(foreign, "config.json", model_type="own", auto_map=MAP)
    model = [str(foreign)] if command == "info" else ["--model", str(foreign)]
    if command != "info":
        model += ["--paragraphs", "any.jsonl"]
    for more, says in (
        ([], "model: foreign; it brings its own code; pass trust_remote_code"),
        (["--trust-remote-code"], "revision: None; trust_remote_code needs a pinned commit"),
        (["--trust-remote-code", "--revision", "main"], "revision: main; trust_remote_code needs"),
    ):
        result = CliRunner().invoke(app, [command, *model, *more])
        assert result.exit_code == 2
        assert f"memcircuits: {says}" in result.stderr
        assert "Traceback" not in result.output


def test_provenance_names_no_path(original):
    model = load_model(original / "model")
    paragraphs = mc.Paragraphs.read(original / "paragraphs.jsonl", n_prefix=10, n_continuation=12)
    found = mc.scan(model, paragraphs, progress=False).provenance
    assert found.model["name"] == "model"
    text = json.dumps([found.model, found.paragraphs, found.options, found.versions])
    assert str(original) not in text
    assert os.sep not in found.model["name"]


# -- determinism ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(tmp_path):
    """On fresh models, in any state of the global generators; another seed differs."""
    files = []
    for turn, seed in enumerate((3, 3, 4)):
        torch.manual_seed(turn)
        np.random.seed(turn)
        random.seed(turn)
        model = zoo.bridge("gpt_neo")
        paragraphs = zoo.mixed(model)
        kept = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        ranking = mc.find_memorization_heads(
            model, paragraphs, mode="resample", draws=50, seed=seed, progress=False
        )
        resampled = mc.ablate_heads(model, paragraphs, mode="resample", seed=seed, progress=False)
        now = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(kept[0], now[0])
        assert kept[1:] == now[1:]
        paths = [tmp_path / f"{kind}-{turn}" for kind in ("ranking", "ablation")]
        files.append(
            [r.save(p).read_bytes() for r, p in zip((ranking, resampled), paths, strict=True)]
        )
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]
    assert files[0][1] != files[2][1]


def content(found: object, folder: Path) -> object:
    """What a call gave, bit by bit."""
    if isinstance(found, Result):
        return found.save(folder / "result").read_bytes()
    if isinstance(found, mc.Paragraphs):
        return content(found.ids, folder)
    if isinstance(found, torch.Tensor):
        return found.dtype, tuple(found.shape), found.contiguous().numpy().tobytes()
    if isinstance(found, dict):
        return {key: content(value, folder) for key, value in found.items()}
    assert isinstance(found, (bytes, str)), type(found)
    return found


@pytest.fixture(scope="module")
def fresh():
    """Two fresh models of the same weights."""
    sources = (zoo.shaken(zoo.hf_model("llama")) for _ in range(2))
    return [as_bridge(source, zoo.tokenizer(), name="tiny-llama") for source in sources]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_repeated_gives_the_same_bits(fresh, tmp_path, call):
    """On another model object of the same weights, in another state of the global generators."""
    found = []
    for turn, model in enumerate(fresh):
        torch.manual_seed(turn)
        np.random.seed(turn)
        random.seed(turn)
        found.append(content(CALLS[call](model, "llama"), tmp_path))
    assert found[0] == found[1]
