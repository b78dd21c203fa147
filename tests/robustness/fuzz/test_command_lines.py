"""Odd command lines: exit status 0 or 2, at most one line of error, no half-written file."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits import cli
from memcircuits.base.io import read_safetensors
from memcircuits.models import loading
from tests.helpers import models as zoo
from tests.helpers.commands import known_options
from tests.helpers.fuzz import COUNTS, TRIED, jsonl

pytestmark = pytest.mark.any_version


@pytest.fixture
def stub(bridge, results, tmp_path, monkeypatch):
    """A folder of good and bad files, in which the commands load the model `tiny` only once."""
    load = mc.load_model  # through the package, which keeps what it imports: not the stub
    load_once = functools.cache(load)

    def load_tiny_once(name, **options):
        return (load_once if str(name) == "tiny" else load)(name, **options)

    monkeypatch.setattr(loading, "load_model", load_tiny_once)
    zoo.save("gpt_neo", tmp_path / "tiny")
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
    "--bos": ("yes", "no", "maybe", "", "AUTO"),
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
    "--device-map": ("", "x", "cuda:99"),
    "--normalize": ("", "nfc"),
    "--text-column": ("", "x"),
    "--prefix-column": ("", "x"),
    "--continuation-column": ("", "x"),
    "--temperature": ("0", "-1", "nan", "x"),
    "--top-k": ("0", "-1", "x"),
    "--top-p": ("0", "2", "nan", "x"),
    "--near-verbatim": (),
    "--plan": (),
    "--plan-paragraphs": ("0", "-1", "x"),
    "--revision": ("", "main", "x" * 40),
    "--seed": ("x", "", "1.5", str(2**70), str(-(2**70))),
    "--top": ("0", "-5", "x"),
    "--twin": ("", "nobody/nothing", "empty", "file", "a b"),
    "--trials": ("0", "-1", "x"),
    "--per-trial": ("0", "-1", "x"),
    "--noise-twin": ("", "nobody/nothing", "empty"),
    "--checkpoints": ("", "x", "0=", "=tiny", "0=nobody/nothing", "-1=tiny", "0=tiny,,"),
    "--twins": ("", "x=tiny", "1=tiny", "nobody/nothing"),
    "--by": ("", "x"),
    "--patched": ("", "norms"),
    "--units": ("", "x", "head,", "neuron"),
    "--neurons": ("0", "x", "9999"),
    "--prompts": ("0", "1", "x"),
    "--seeds": ("0", "-1", "x"),
    "--sparsity": ("0", "1", "-1", "nan", "x"),
    "--shuffles": ("-1", "x"),
    "--eta": ("0", "nan", "x", "inf"),
    "--within": (),
    "--edit": PATHS,
    "--attacks": ("0", "-1", "x"),
    "--relearning-steps": ("-1", "x"),
    "--stand-in": (),
    "--faithfulness": ("0", "2", "nan", "x"),
    "--reference": PATHS,
    "--row": ("-1", "999", "x"),
    "--verify": ("-1", "x"),
    "--cuts": ("", "x", "99999", "1.5", "0,,1"),
    "--backtrack": ("0", "-1", "x"),
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
    "--candidates": PATHS,
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
    "--txt": ("", "line"),
    "--strict": (),
    "--html": ("empty", "/dev/null/x", "\0"),
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
    "--kinds": ("", "tail", "head,tail"),
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
    "--control-text": ("", "x"),
    "--score": ("", "x"),
    "--compare-controls": (),
    "--fold-ln": (),
    "--trust-remote-code": (),
    "--json": (),
}


def odd_command_line(
    commands: dict[str, list[str]], draw: random.Random
) -> tuple[str, dict[str, str], list[str]]:
    """A command, its options, one to three of them odd, and both as arguments."""
    command = draw.choice([*commands, "no-such-command", ""])
    chosen = {"--model": "tiny", "--paragraphs": "good.jsonl"}
    if command == "heads":  # whose own folder holds what `report` is given here
        chosen |= {"--out": "heads"}
    if command in ("counterfactual", "transplant", "bench natural"):
        chosen |= {"--twin": "tiny"}
    if command == "formation":
        chosen |= {"--checkpoints": "0=tiny,5=tiny", "--max-paragraphs": "0"}
    if command == "plant":
        chosen |= {"--where": "L1H2", "--steps": "2"}
    if command == "circuit":
        chosen |= {"--draws": "1", "--verify": "1"}
    if command == "core":
        chosen |= {"--seeds": "2", "--steps": "2"}
    if command == "lookups":
        chosen |= {"--neurons": "2"}
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
    if command == "compare":
        arguments += [draw.choice(["tiny"] * 3 + ["good.safetensors", "missing"]) for _ in "ab"]
    for key, value in chosen.items():
        arguments += [key] if key in OPTIONS and not OPTIONS[key] else [key, value]
    return command, chosen, arguments


def check_and_remove(path: Path) -> None:
    """A file that a command wrote is whole, whatever the command ended with."""
    assert not path.name.startswith("."), "a temporary file stayed"
    if path.suffix == ".json":
        json.loads(path.read_text())
    if path.suffix == ".parquet":
        pd.read_parquet(path)
    if path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>")
    if path.suffix == ".safetensors":
        read_safetensors(path)
    path.unlink()


def test_every_option_is_among_them():
    known = {option for own in known_options().values() for option in own}
    without_value = {"--help", "--quiet", "--verbose"}
    assert known - set(OPTIONS) <= {*without_value, "--ray-address"}  # a new option: add it


def test_command_lines(stub):
    commands = known_options()
    draw = random.Random(4)
    runner = CliRunner()
    before = {path: path.read_bytes() for path in stub.rglob("*") if path.is_file()}
    statuses = set()
    for _ in range(COUNTS["command lines"]):
        TRIED["command lines"] += 1
        command, chosen, arguments = odd_command_line(commands, draw)
        result = runner.invoke(cli.app, arguments)
        what = arguments, result.output[-1500:]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(what) from result.exception
        assert result.exit_code in (0, 2), what
        assert "Traceback" not in result.output, what
        errors = [line for line in result.stderr.splitlines() if line.startswith("memcircuits: ")]
        assert len(errors) <= 1, what
        statuses.add(result.exit_code)

        try:
            for path in stub.rglob("*"):
                if path not in before and path.is_file():
                    check_and_remove(path)
        except Exception as error:
            raise AssertionError(what) from error
        out = stub / chosen.get("--out", "nothing")
        if command in ("unigrams build", "report") and out in before:  # --out names a file
            out.write_bytes(before[out])
        assert {p: p.read_bytes() for p in before} == before, what
    assert statuses == {0, 2}
