"""Files are written whole, where they were asked for, and say nothing of the user's computer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.benchmark import trial_kinds
from memcircuits.cli import app
from memcircuits.models.loading import load_model
from memcircuits.results.result import Result
from tests.helpers.commands import known_options

pytestmark = pytest.mark.any_version


@pytest.mark.parametrize("name", ["a b", "ü/模", "../sideways", "-x", "a;b|c", "x" * 100, "..."])
def test_results_are_written_where_they_were_asked_for(results, tmp_path, name):
    (tmp_path / "here").mkdir()
    result = Result.load(results / "ScoreMap.safetensors")
    path = result.save(tmp_path / "here" / name / "result.safetensors")
    assert path.is_file()
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.resolve() for p in written] == [path.resolve()]


def test_a_failed_write_leaves_the_old_file(results, tmp_path, monkeypatch):
    result = Result.load(results / "ScoreMap.safetensors")
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
    result = (p for folder in folders for p in folder.rglob("*") if p.is_file())
    return {p: p.stat().st_mtime_ns for p in result}


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
    "audit": [
        *("audit", "--edit", "{original}/edit.safetensors", "--stand-in", "--attacks", "1"),
        *("--relearning-steps", "1", "--out", "{out}"),
    ],
    "edit": ["edit", "--fraction", "0.3", "--kl-budget", "9", "--out", "{out}"],
    "plant": [
        *("plant", "--where", "L0.attn,L0.mlp,L1.mlp,L2H1", "--kl-budget", "9"),
        *("--out", "{out}", "--json"),
    ],
    "ablate": ["ablate", "--out", "{out}"],
    "attention": ["attention", "--rows", "0,2", "--out", "{out}"],
    "unigrams": ["unigrams", "build", "--out", "{out}/unigrams.safetensors"],
    "report": ["report", "{original}/ranking.safetensors", "--out", "{out}/report.html"],
    "compare": ["compare", "{original}/model", "{original}/model", "--out", "{out}"],
    "counterfactual": ["counterfactual", "--twin", "{original}/model", "--out", "{out}"],
    "transplant": [
        *("transplant", "--twin", "{original}/model", "--units", "head"),
        *("--max-paragraphs", "2", "--out", "{out}"),
    ],
    "formation": [
        *("formation", "--checkpoints", "0={original}/model,9={original}/model"),
        *("--max-paragraphs", "0", "--out", "{out}"),
    ],
    "cut-prefix": ["cut-prefix", "--cuts", "0,1", "--max-paragraphs", "2", "--out", "{out}"],
    "influence": ["influence", "--max-paragraphs", "2", "--out", "{out}"],
    "contrast": ["contrast", "--out", "{out}"],
    "lookups": ["lookups", "--neurons", "2", "--prompts", "4", "--out", "{out}"],
    "core": ["core", "--seeds", "2", "--steps", "2", "--out", "{out}"],
    "circuit": ["circuit", "--draws", "1", "--verify", "1", "--out", "{out}"],
    "map": ["map", "{original}/document.txt", "--out", "{out}/map.html"],
    "bench natural": [
        *("bench", "natural", "--twin", "{original}/twin", "--paragraphs", "{original}/both.jsonl"),
        *("--quick", "--localizers", "random", "--out", "{out}"),
    ],
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
    monkeypatch.setattr(trial_kinds, "N_TRIALS", {"block": 1, "null": 1})
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
    written = result.stdout.encode() + b"".join(path.read_bytes() for path in new)
    for private in (str(tmp_path), str(original), str(Path.home()), os.getcwd()):
        assert private.encode() not in written
    for path in new:
        assert path.suffix != ".html" or b"<script>alert(1)" not in path.read_bytes()
    assert "Traceback" not in result.output


def test_provenance_names_no_path(original):
    model = load_model(original / "model")
    paragraphs = mc.Paragraphs.read(original / "paragraphs.jsonl", n_prefix=10, n_continuation=12)
    result = mc.scan(model, paragraphs, progress=False).provenance
    assert result.model["name"] == "model"
    text = json.dumps([result.model, result.paragraphs, result.options, result.versions])
    assert str(original) not in text
    assert os.sep not in result.model["name"]
