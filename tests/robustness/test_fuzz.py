"""Thousands of malformed inputs: each gives a result or one clear error, and never half a file.

All draws are seeded, so a failure can be repeated; the message of a failed assertion names the
input. `FUZZ=10 pytest tests/test_fuzz.py -rP` makes ten times as many and prints how
many there were of each kind.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits import cli
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.trials import read_trials, run_trials
from memcircuits.core.errors import InputError
from memcircuits.core.io import read_safetensors
from memcircuits.data.windows import Windows
from memcircuits.editing.evaluation import evaluate_edit
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.models import loading
from memcircuits.results.result import Result
from tests.helpers import models as zoo
from tests.helpers.commands import known_options

# How many malformed inputs each test makes at least; 2,000 were promised.
TIMES = int(os.environ.get("FUZZ", "1"))
COUNTS = {
    "spoiled files": 110,  # for each of the formats
    "odd records": 130,
    "spoiled results": 40,  # for each of the kinds
    "scan folders": 50,
    "trials": 40,
    "model folders": 150,
    "gguf files": 60,
    "command lines": 300,
    "odd arguments": 200,
}
COUNTS = {kind: TIMES * n for kind, n in COUNTS.items()}
TRIED: Counter[str] = Counter()


@contextlib.contextmanager
def only_input_errors(kind: str, what: object) -> Iterator[None]:
    """Anything but a clear error is a failure that says what the input was."""
    TRIED[kind] += 1
    try:
        yield
    except InputError:
        return
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\ninput: {what!r}"[:2000]) from error


def spoil(raw: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, put in, doubled, swapped, or all of them random."""
    at = draw.randrange(len(raw) + 1)
    to = min(len(raw), at + draw.randrange(1, 40))
    noise = draw.randbytes(draw.randrange(1, 20))
    signs = "".join(draw.choices(string.punctuation + "\0\n\r\t\ufeff\u2028é😀0", k=3)).encode()
    return draw.choice(
        (
            lambda: raw[:at],
            lambda: raw[at:],
            lambda: raw[:at] + raw[to:],
            lambda: raw[:at] + noise + raw[at:],
            lambda: raw[:at] + signs + raw[at:],
            lambda: raw[:at] + noise + raw[at + len(noise) :],
            lambda: raw[:to] + raw[at:],
            lambda: bytes(b ^ (1 << draw.randrange(8)) if draw.random() < 0.02 else b for b in raw),
            lambda: draw.randbytes(len(raw) % 200),
            lambda: noise * 50,
        )
    )()


# -- files of paragraphs --------------------------------------------------------------------------


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def through(write: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    def made(path: Path) -> bytes:
        write(path)
        return path.read_bytes()

    return made


IDS = zoo.random_ids(4, 24)
TEXTS = [" ".join(f"<{i}>" for i in row) for row in IDS.tolist()]
FORMATS: dict[str, Callable[[Path], bytes]] = {
    "ids.jsonl": lambda path: jsonl([{"id": i, "ids": r} for i, r in enumerate(IDS.tolist())]),
    "text.jsonl": lambda path: jsonl([{"text": text, "source": "é"} for text in TEXTS]),
    "halves.jsonl": lambda path: jsonl(
        [{"prefix_ids": row[:10], "suffix_ids": row[10:]} for row in IDS.tolist()]
    ),
    "packed.jsonl.gz": lambda path: gzip.compress(jsonl([{"ids": r} for r in IDS.tolist()])),
    "packed.jsonl.zst": through(lambda path: _zstd(path, jsonl([{"text": t} for t in TEXTS]))),
    "table.csv": lambda path: pd.DataFrame({"text": TEXTS, "n": 1}).to_csv().encode(),
    "plain.txt": lambda path: "\n\n".join(TEXTS).encode(),
    "table.parquet": through(lambda path: pd.DataFrame({"ids": IDS.tolist()}).to_parquet(path)),
    "array.npy": through(lambda path: np.save(path, IDS.numpy())),
    "tensor.pt": through(lambda path: torch.save(IDS, path)),
    "half_prefix.npy": through(
        lambda path: (
            np.save(path, IDS[:, :10].numpy()),
            np.save(path.with_name("half_suffix.npy"), IDS[:, 10:].numpy()),
        )
    ),
}


def _zstd(path: Path, raw: bytes) -> None:
    import pyarrow as pa

    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(raw)


def read(path: Path) -> mc.Paragraphs:
    return mc.Paragraphs.read(path, zoo.tokenizer(), n_prefix=10, n_continuation=12)


@pytest.mark.parametrize("name", FORMATS)
def test_spoiled_files(tmp_path, name):
    path = tmp_path / name
    raw = FORMATS[name](path)
    path.write_bytes(raw)
    assert len(read(path)) == len(IDS)
    draw = random.Random(name)
    outcomes = set()
    for _ in range(COUNTS["spoiled files"]):
        spoiled = spoil(raw, draw)
        path.write_bytes(spoiled)
        with only_input_errors("spoiled files", (name, spoiled)):
            outcomes.add("error")
            assert isinstance(read(path), mc.Paragraphs)
            outcomes.add("read")
    assert "error" in outcomes


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 101, 2**31, 2**63, 2**200, 1.5, float("nan"), float("inf"), "", "x",
    "\ud800", "\0", [], {}, [1], ["1"] * 22, [1.0] * 22, [True] * 22, [-1] * 22, [2**40] * 22,
    [None] * 22, [[1]] * 22, {"a": 1}, [1] * 21, [1] * 22, "<1> " * 21, "<1> " * 22, "\u2028" * 30,
    "é" * 99,
)  # fmt: skip


def test_odd_records(tmp_path):
    draw = random.Random(1)
    path = tmp_path / "odd.jsonl"
    names = (
        "ids",
        "tokens",
        "text",
        "paragraph",
        "prefix_ids",
        "suffix_ids",
        "id",
        "index",
        "x",
        "",
    )
    for turn in range(COUNTS["odd records"]):
        records: list[Any] = [{"ids": [1] * 24}] if turn % 3 else []
        for _ in range(draw.randrange(1, 4)):
            keys = draw.sample(names, draw.randrange(1, 4))
            records.append({key: draw.choice(ODD) for key in keys})
        if turn % 10 == 0:
            records.append(draw.choice(ODD))
        path.write_bytes(jsonl(records))
        with only_input_errors("odd records", records):
            found = read(path)
            assert all(isinstance(name, str) for name in found.names)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\n\n", b"[" * 100_000, b'{"ids":' * 10_000, b'{"ids": [' + b"1," * 50 + b"]}",
        b"\xff\xfe" * 10, b"\xef\xbb\xbf", b"null", b"{}", b'{"ids": null}', b'"ids"', b"1" * 5000,
        b'{"ids": [' + b"9" * 5000 + b"]}", b'{"text": "' + b"a " * 10**6 + b'"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "ending", [".jsonl", ".csv", ".txt", ".parquet", ".npy", ".pt", ".jsonl.gz"]
)
def test_strange_files(tmp_path, raw, ending):
    path = tmp_path / f"strange{ending}"
    path.write_bytes(raw)
    found = None
    with only_input_errors("strange files", (ending, raw[:100])):
        found = read(path)
    assert path.read_bytes() == raw
    if found is not None:  # what is accepted can be used as it is
        assert len(found) > 0
        assert found.ids.shape[1] == 22
        assert 0 <= int(found.ids.min()) <= int(found.ids.max()) < zoo.D_VOCAB


@pytest.mark.parametrize(
    "name", ["", ".", "..", "missing.jsonl", "a\0b.jsonl", "x" * 300 + ".pt", "x.exe"]
)
def test_paths_that_are_no_files(tmp_path, name):
    with only_input_errors("strange files", name), pytest.raises(InputError):
        read(tmp_path / name)


# -- saved results --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridge():
    return zoo.bridge("gpt_neo")


KINDS = (
    "Scan",
    "ScoreMap",
    "ParameterGradients",
    "ActivationGradients",
    "RareTokenAttention",
    "PatchMap",
    "Perturbation",
    "Ranking",
    "Edit",
    "Planted",
    "EditReport",
    "Recovery",
    "LayerPatches",
    "MinimalSets",
    "NoiseCurve",
    "UnigramTable",
)


@pytest.fixture(scope="module")
def results(bridge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    paragraphs = zoo.mixed(bridge, n=3)
    quiet: dict[str, Any] = {"progress": False}
    edit = mc.unlearn(bridge, paragraphs[:3], paragraphs[3:], recipe=Recipe(steps=1), **quiet)
    sides = paragraphs[:3], paragraphs[3:]
    made = [
        mc.scan(bridge, paragraphs, **quiet),
        mc.ablate_heads(bridge, paragraphs, **quiet),
        mc.parameter_gradients(bridge, paragraphs, **quiet),
        mc.activation_gradients(bridge, paragraphs, sites=["z"], **quiet),
        mc.rare_token_attention(bridge, paragraphs, permutations=3, **quiet),
        mc.patch_heads(bridge, paragraphs[:2], paragraphs[2:4], **quiet),
        mc.perturb_prefix(bridge, paragraphs, **quiet),
        mc.find_memorization_heads(bridge, paragraphs, draws=20, **quiet),
        edit,
        mc.plant(bridge, paragraphs[3], where=["L0.mlp", "L1.mlp"], kl_budget=99.0, **quiet),
        evaluate_edit(bridge, edit, *sides, attacks=1, **quiet),
        recovery_curve(bridge, edit, *sides, steps=1, **quiet),
        patch_layers(bridge, paragraphs[:2], paragraphs[2:4], positions=[0], **quiet),
        minimal_sets(bridge, paragraphs[:1], max_tokens=1, **quiet),
        weight_noise(bridge, *sides, sizes=(0.1,), draws=1, **quiet),
    ]
    assert {type(result) for result in made} == set(Result.types.values())
    for result in made:
        result.save(folder / f"{type(result).__name__}.safetensors")
    mc.UnigramTable(torch.arange(zoo.D_VOCAB), "counts").save(folder / "UnigramTable.safetensors")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_spoiled_results(results, tmp_path, name):
    raw = (results / f"{name}.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path = tmp_path / "spoiled.safetensors"
    load = mc.UnigramTable.read if name == "UnigramTable" else Result.load
    draw = random.Random(name)
    whole = type(load(results / f"{name}.safetensors"))
    refused = 0
    for turn in range(COUNTS["spoiled results"]):
        # Half of them keep the length and the data and spoil only the header's text.
        text = spoil(raw[8:end], draw)
        kept = len(text).to_bytes(8, "little") + text + raw[end:]
        spoiled = kept if turn % 2 else spoil(raw, draw)
        path.write_bytes(spoiled)
        found = None
        with only_input_errors("spoiled results", (name, spoiled[:1500])):
            found = load(path)
        assert path.read_bytes() == spoiled
        assert found is None or type(found) is whole
        refused += found is None
    assert refused > COUNTS["spoiled results"] / 2


@pytest.mark.parametrize("name", KINDS[:-1])
def test_provenance_says_what_a_result_came_from(results, name):
    """Weights, paragraphs, options (the seed, where there is one) and versions."""
    found = Result.load(results / f"{name}.safetensors").provenance
    assert len(found.model["fingerprint"]) == 16
    assert {"name", "class", "architecture", "basis", "dtype", "device"} <= set(found.model)
    assert all(len(group["hash"]) >= 8 for group in found.paragraphs.values())
    assert found.paragraphs
    assert isinstance(found.options, dict)
    assert {"memcircuits", "transformer-lens", "torch", "transformers"} <= set(found.versions)


# -- folders of a scan and of a benchmark ---------------------------------------------------------


def odd_value(raw: bytes, draw: random.Random) -> bytes:
    """JSON with one odd value in place of another."""
    found = inside = json.loads(raw)
    key = draw.choice(sorted(found))
    if isinstance(found[key], dict) and found[key] and draw.random() < 0.7:
        inside = found[key]
        key = draw.choice(sorted(inside))
    inside[key] = draw.choice(VALUES)
    return json.dumps(found).encode()


def spoiled_folder(good: Path, folder: Path, draw: random.Random) -> Path:
    """A copy of a folder with one file spoiled."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    raw = path.read_bytes()
    odd = path.suffix == ".json" and draw.random() < 0.5
    path.write_bytes(odd_value(raw, draw) if odd else spoil(raw, draw))
    return path


def test_spoiled_scan_folders(bridge, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl([{"ids": row} for row in zoo.mixed(bridge).ids.tolist()]))
    options: dict[str, Any] = {"windows": Windows(n_prefix=10, n_continuation=12)}
    options |= {"part_records": 3, "progress": False}
    scan_to_disk(bridge, source, tmp_path / "good", **options)
    draw = random.Random(5)
    done = 0
    for turn in range(COUNTS["scan folders"]):
        path = spoiled_folder(tmp_path / "good", tmp_path / "folder", draw)
        what = path.name, path.read_bytes()[:1500]
        if turn % 10 == 0:
            path.unlink()
        with only_input_errors("scan folders", what):
            resumed = scan_to_disk(
                bridge, source, tmp_path / "folder", resume=turn % 3 > 0, **options
            )
            assert resumed.summary["memorized"] == 4
            done += 1
    assert 0 < done < COUNTS["scan folders"]


def test_spoiled_trials(bridge, tmp_path):
    many = zoo.mixed(bridge) + mc.Paragraphs.from_tokens(zoo.random_ids(64, 22, 2), n_prefix=10)
    pool = ParagraphPool.of(bridge, many)
    options: dict[str, Any] = {"counts": {"block": 1, "null": 1}, "progress": False}
    run_trials(pool, tmp_path / "good", **options)
    draw = random.Random(6)
    done = 0
    for _ in range(COUNTS["trials"]):
        path = spoiled_folder(tmp_path / "good", tmp_path / "folder", draw)
        with only_input_errors("trials", (path.name, path.read_bytes()[:1500])):
            run_trials(pool, tmp_path / "folder", **options)  # those that are there stay
            write_leaderboard(read_trials(tmp_path / "folder"), tmp_path / "folder")
            done += 1
    assert 0 < done < COUNTS["trials"]


# -- models ---------------------------------------------------------------------------------------


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


VALUES: tuple[Any, ...] = (None, True, -1, 0, 3, 1.5, "", "x", [], {}, [1, 2], {"a": None}, "llama")


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


# -- command lines --------------------------------------------------------------------------------


@pytest.fixture
def stub(bridge, results, tmp_path, monkeypatch):
    """Commands get a tiny model at once; all else about loading is real."""
    load = mc.load_model  # through the package, which keeps what it imports: not the stub

    def quick(name, **options):
        if str(name) != "tiny":
            return load(name, **options)
        loading.resolve_device(options.get("device", "auto"))
        loading.resolve_dtype(options.get("dtype", "float32"))
        loading.refuse_remote_code("", options.get("trust_remote_code"), options.get("revision"))
        return bridge

    monkeypatch.setattr(loading, "load_model", quick)
    monkeypatch.chdir(tmp_path)
    good = zoo.mixed(bridge, n=3).ids.tolist()
    (tmp_path / "good.jsonl").write_bytes(jsonl([{"ids": row} for row in good]))
    (tmp_path / "short.jsonl").write_bytes(jsonl([{"ids": row[:5]} for row in good]))
    (tmp_path / "other.jsonl").write_bytes(jsonl([{"ids": [500] * 22}]))
    (tmp_path / "broken.jsonl").write_bytes(b'{"ids": [1, 2')
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    shutil.copy(results / "Ranking.safetensors", tmp_path / "good.safetensors")
    return tmp_path


PATHS = ("good.jsonl", "short.jsonl", "other.jsonl", "broken.jsonl", "empty.txt", "file", "empty",
         "missing", "", "/", "..", "\0", "x" * 300, "é.pt", "-1")  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "--model": (
        "nobody/nothing",
        "empty",
        "file",
        "",
        "..",
        "a b",
        "x.gguf",
        "file.gguf",
        "\udce9",
    ),
    "--paragraphs": PATHS[1:],
    "--control": PATHS,
    "--unigrams": PATHS,
    "--out": ("file", "/dev/null/x", "good.jsonl/x", "\0", "x" * 300),
    "--n-prefix": ("0", "-1", "x", "", "1e9", "999999", "1.5"),
    "--n-continuation": ("0", "-1", "x", "", "99999999999999999999"),
    "--device": ("tpu", "cuda:99", "", "cpu:1", "mps:x"),
    "--dtype": ("float7", "", "int8", "torch.float32x"),
    "--revision": ("", "main", "x" * 40),
    "--seed": ("x", "", "1.5", str(2**70), str(-(2**70))),
    "--top": ("0", "-5", "x"),
    "--mode": ("", "none", "zero "),
    "--max-paragraphs": ("0", "1", "x"),
    "--batch-size": ("0", "-1", "x"),
    "--no-such-option": ("1",),
    "--fraction": ("0", "-1", "2", "nan", "x"),
    "--targets": ("0", "x", "2"),
    "--mask": ("", "most"),
    "--recipe": ("", "none"),
    "--heads": ("", "L9H9", "H1L1", "L1H2,,", "é"),
    "--layers": ("", "9", "-1", "x", "0,0"),
    "--components": ("", "W_X", "W_Q,"),
    "--kl-budget": ("0", "-1", "nan", "inf", "x"),
    "--export": ("file", "empty", "\0", "good.jsonl/x"),
    "--rewritten": PATHS,
    "--corrupted": PATHS,
    "--objective": ("", "x"),
    "--pool": ("", "sum"),
    "--average": ("", "token"),
    "--replacement": ("", "x", "frequency"),
    "--draws": ("0", "-1", "x"),
    "--site": ("", "x", "pattern"),
    "--direction": ("", "up"),
    "--metric": ("", "x", "logit_diff"),
    "--method": ("", "guess"),
    "--positions": ("", "x", "999", "-1"),
    "--stride": ("0", "-1", "x"),
    "--offset": ("-1", "x", "9999"),
    "--min-unique": ("-1", "2", "nan", "x"),
    "--drop": ("", "x"),
    "--part-records": ("0", "x"),
    "--shard-index": ("-1", "3", "x"),
    "--num-shards": ("0", "x", "2"),
    "--engine": ("", "spark"),
    "--workers": ("0", "x"),
    "--processes": ("0", "x"),
    "--em-below": ("-1", "0", "nan", "x", ""),
    "--recover": ("-1", "x", "1.5"),
    "--heldout": PATHS,
    "--planted": ("0", "-1", "x", "1.5"),
    "--localizers": ("", "guess", "oracle,,"),
    "--where": ("", "L9H9", "L1", "L1.x", "neurons:2", "weights:x", "L1H2,,", "é"),
    "--steps": ("0", "-1", "x"),
    "--rows": ("", "99", "-1", "x", "0,,1"),
    "--triggers": ("-1", "x", ""),
    "--activations": (),
    "--arms": (),
    "--noise": (),
    "--quick": (),
    "--resume": (),
    "--deduplicate": (),
    "--minimal": (),
    "--per-loss": (),
    "--match-nll": (),
    "--trust-remote-code": (),
    "--json": (),
}


def test_command_lines(stub):
    commands = known_options()
    known = {option for own in commands.values() for option in own}
    assert known - set(OPTIONS) <= {"--help", "--quiet", "--ray-address"}  # a new option: add it
    draw = random.Random(4)
    runner = CliRunner()
    before = {path: path.read_bytes() for path in stub.rglob("*") if path.is_file()}
    statuses = set()
    for _ in range(COUNTS["command lines"]):
        TRIED["command lines"] += 1
        command = draw.choice([*commands, "no-such-command", ""])
        chosen = {
            "--model": "tiny",
            "--paragraphs": "good.jsonl",
        }
        if command == "heads":  # whose own folder holds what `report` is given here
            chosen |= {"--out": "heads"}
        if command == "plant":
            chosen |= {"--where": "L1H2", "--steps": "2"}
        if command != "unigrams build":
            chosen |= {"--n-prefix": "10", "--n-continuation": "12"}
        own = sorted(set(commands.get(command, ())) & set(OPTIONS) - {"--help"})
        odd = draw.sample(own or sorted(OPTIONS), draw.randrange(1, 3))
        if draw.random() < 0.05:
            odd.append(draw.choice(sorted(OPTIONS)))
        chosen |= {key: draw.choice(OPTIONS[key] or ("",)) for key in odd}
        arguments = command.split() or [command]
        if command == "report":
            arguments.append(draw.choice(["good.safetensors"] * 3 + ["file", "empty", "missing"]))
        for key, value in chosen.items():
            arguments += [key] if key in OPTIONS and not OPTIONS[key] else [key, value]
        result = runner.invoke(cli.app, arguments)
        shown = arguments, result.output[-1500:]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(shown) from result.exception
        assert result.exit_code in (0, 2), shown
        assert "Traceback" not in result.output, shown
        ours = [line for line in result.stderr.splitlines() if line.startswith("memcircuits: ")]
        assert len(ours) <= 1, shown
        statuses.add(result.exit_code)
        for path in stub.rglob("*"):
            if path in before or not path.is_file():
                continue
            assert not path.name.startswith("."), shown
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.suffix == ".parquet":
                pd.read_parquet(path)
            if path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>"), shown
            if path.suffix == ".safetensors":
                read_safetensors(path)
            path.unlink()
        asked = stub / chosen.get("--out", "nothing")
        if command in ("unigrams build", "report") and asked in before:  # --out names a file
            asked.write_bytes(before[asked])
        assert {p: p.read_bytes() for p in before} == before, shown
    assert statuses == {0, 2}


# -- arguments ------------------------------------------------------------------------------------


CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "scan": {"batch_size": (0, -1, "2", 1.5)},
    "ablate_heads": {
        "mode": ("", None, 0, []),
        "reference": (3, [], "x", [[1]]),
        "seed": ("x", 1.5),
    },
    "parameter_gradients": {"pool": ("", None, "sum", [])},
    "rare_token_attention": {
        "query": (0, -1, 22, "x", 1.5),
        "permutations": (0, -1, "x", 1.5),
        "unigrams": (3, "x"),
    },
    "find_memorization_heads": {
        "control": (3, [], [[1]], "x"),
        "mode": ("", None),
        "max_paragraphs": (0, 1, -1, "x", 1.5),
        "draws": (0, -1, "x"),
        "unigrams": (3, "x"),
        "method": ("", None, "fast"),
    },
    "contrastive_gradients": {
        "pool": ("", None),
        "n_control": (0, "x", 1.5),
        "draws": (0, "x"),
    },
    "activation_gradients": {
        "sites": ("z", (), ("x",), None, (1,)),
        "token": (-1, 12, "x", [1, 2], 1.5),
    },
    "patch_heads": {
        "site": ("", "resid_pre", None),
        "positions": ("all", [99], [-1], [], 3, ["x"], [1.5]),
        "metric": ("", "x", 3, None),
        "direction": ("", None, "up"),
        "method": ("", None, "x"),
        "check": (0, 3, "x"),
    },
    "perturb_prefix": {
        "replacement": ("", None, "x", []),
        "draws": (0, -1, "x", 1.5),
        "unigrams": (3, "x"),
    },
    "unlearn": {
        "fraction": (0, -1, 2, "x", float("nan"), None),
        "mask": ("", None, "most"),
        "heads": (["L9H9"], ["x"], [(1, 99)], 3),
        "layers": ([9], [-1], ["x"], 3),
        "components": (["W_X"], [3], 3),
        "kl_budget": (0, "x", -1),
        "recipe": (None, "fast", Recipe(steps=0)),
        "seed": ("x", 1.5),
    },
    "edit": {"fraction": (0, "x"), "mask": ("", None), "kl_budget": (0, "x")},
    "plant": {
        "where": ("", "L9H9", "L1.x", [], 3, None, [3], "neurons:2", "weights:x", "weights:0"),
        "components": (["W_X"], 3, "W_Q"),
        "steps": (0, "x", 1.5),
        "learning_rate": (0, "x", float("nan")),
        "kl_weight": (-1, "x", float("inf")),
        "kl_budget": (0, "x", -1),
        "seed": ("x", 1.5),
        "control": (3, "x", [[1]]),
    },
    "attention_view": {
        "layer": (9, -1, "x", 1.5),
        "heads": ([99], ["x"], 3, []),
        "compare": (3, "x", [[1]]),
        "unigrams": (3, "x"),
    },
}
PARAGRAPHS: tuple[Any, ...] = (
    None, 3, 1.5, "text", b"bytes", [], [[]], [[1, 2], [1]], [["a"]], [[1.5] * 60], [None], {}, {1},
    object(), torch.zeros(2, 60), torch.zeros(2, 60, dtype=torch.bool), torch.zeros(0, 60).long(),
    torch.zeros(2, 3, 4).long(), torch.zeros(60).long(), torch.full((2, 60), -1),
    torch.full((2, 60), zoo.D_VOCAB), torch.zeros(2, 500).long(), torch.zeros(2, 50).long(),
    [[2**70] * 60], [[True] * 60], ["<1>"], ["<1> " * 100, 3], [""], np.zeros((2, 60)), (),
    iter([]),
)  # fmt: skip


def call(
    function: str, bridge: Any, good: mc.Paragraphs, value: Any, options: dict[str, Any]
) -> None:
    """Functions of two or three sets of paragraphs get good ones beside the odd one."""
    beside: dict[str, tuple[Any, ...]] = {
        "contrastive_gradients": (good[3:],),
        "patch_heads": (good,),
        "unlearn": (good[3:],),
        "edit": (good[3:], good[3:]),
    }
    if function == "attention_view":
        mc.attention_view(bridge, value, **options)
        return
    if function == "plant":
        options = {"where": "L1.mlp", "steps": 2, **options}
    getattr(mc, function)(
        bridge, value, *beside.get(function, ()), **{"progress": False, **options}
    )


def test_odd_arguments(bridge):
    good = zoo.mixed(bridge, n=3)
    cases: list[tuple[str, Any, dict[str, Any]]] = []
    for function, options in CALLS.items():
        cases += [(function, value, {}) for value in PARAGRAPHS]
        more = {"memory_budget": (0, -1, "x")}
        if function in ("rare_token_attention", "attention_view"):
            more = {}
        usable = good[:1] if function == "attention_view" else good[:3]
        if function in ("scan", "find_memorization_heads", "ablate_heads"):
            usable = good
        for option, values in {**options, **more}.items():
            cases += [(function, usable, {option: value}) for value in values]
    assert len(cases) >= COUNTS["odd arguments"] // TIMES
    wrong = []
    for function, value, options in cases:
        TRIED["odd arguments"] += 1
        try:
            call(function, bridge, good, value, options)
        except InputError:
            continue
        except Exception as error:
            wrong.append(
                f"{function}({value!r:.60}, {options}): {type(error).__name__}: {error}"[:200]
            )
        else:
            wrong.append(f"{function}({value!r:.60}, {options}): accepted")
    assert not wrong, "\n".join(wrong)


def test_the_promised_number():
    """The last test of the file: counts what the others tried; prints it under `-rP`."""
    for kind, n in sorted(TRIED.items()):
        print(f"{n:6} {kind}")
    print(f"{TRIED.total():6} malformed inputs")
    if set(COUNTS) <= set(TRIED):  # else only some of the tests were run
        assert TRIED.total() >= 2000
        assert all(TRIED[kind] >= n for kind, n in COUNTS.items())
