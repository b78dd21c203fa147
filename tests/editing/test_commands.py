"""The commands that change weights, and that of gradients, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.commands import output
from memcircuits.commands.inputs import Inputs
from memcircuits.commands.selection import draw_targets, kept_and_unseen
from memcircuits.editing.audits.verdict import MEANINGS, Verdict
from memcircuits.editing.edit import Edit
from tests.helpers import models as zoo
from tests.helpers.editing import UNSEEN

SURFACE = ["--recipe", "surface", "--fraction", "0.02", "--kl-budget", "0.05"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a command on a tiny model in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    zoo.save("gpt_neo", folder / "model")
    paragraphs = zoo.mixed(zoo.bridge("gpt_neo"), n=8)
    with (folder / "paragraphs.jsonl").open("w") as file:
        for name, ids in zip(paragraphs.names, paragraphs.ids.tolist(), strict=True):
            file.write(json.dumps({"id": name, "ids": ids}) + "\n")

    def call(*arguments: str, as_json: bool = True, quiet: bool = True):
        shared = ["--model", folder / "model", "--paragraphs", folder / "paragraphs.jsonl"]
        lengths = ["--n-prefix", "10", "--n-continuation", "12"]
        shown = [*["--quiet"] * quiet, *["--json"] * as_json]
        words = [*arguments, *map(str, shared), *lengths, *shown]
        return CliRunner().invoke(app, words, catch_exceptions=False)

    return call


def test_other_recitations_are_kept_or_measured_and_never_both():
    others = UNSEEN
    kept, unseen = kept_and_unseen(others)
    assert not set(kept.names) & set(unseen.names)
    assert set(kept.names) | set(unseen.names) == set(others.names)
    assert kept_and_unseen(None) == (None, None)
    assert kept_and_unseen(others[:1])[0] is None


@pytest.mark.parametrize("objective", ["nll", "contrastive"])
def test_gradients_command(run, tmp_path, objective):
    result = run("gradients", "--objective", objective, "--out", str(tmp_path))
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    sets = {"contrastive"} if objective == "contrastive" else {"memorized", "control"}
    assert set(record["values"]) == set(record["tables"]) == sets
    assert all(0 < group["lower_half_share"] < 1 for group in record["values"].values())
    assert len(list(tmp_path.glob("gradients-*.safetensors"))) == len(sets)


def test_activations_command(run, tmp_path):
    result = run("gradients", "--activations", "--out", str(tmp_path))
    assert result.exit_code == 0
    tables = json.loads(result.stdout)["tables"]
    assert set(tables) == {"memorized", "control"}
    assert {row["site"] for row in tables["memorized"]} == {
        "q",
        "k",
        "v",
        "z",
        "pre",
        "post",
    }
    assert len(list(tmp_path.glob("activations-*.safetensors"))) == 2


def test_unlearn_command_compares_arms_and_tries_to_bring_it_back(run, tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    lines = [json.dumps({"id": str(i), "ids": ids}) for i, ids in enumerate(UNSEEN.ids.tolist())]
    heldout.write_text("\n".join(lines))
    result = run(
        "unlearn", *SURFACE, "--arms", "--recover", "2",
        "--noise", "--heldout", str(heldout), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    arms = {(row["set"], row["measure"]): row for row in record["tables"]["arms"]}
    changed = arms["edit", "changed"]
    assert changed["no-op"] == 0
    assert 0 < changed["random"] <= 0.02 * changed["all"] / 0.95
    assert 0 < changed["top"] <= 0.02 * changed["all"] / 0.95
    em = arms["memorized", "em"]
    assert em["no-op"] == 12
    assert em["top"] < 2
    assert {"random", "random-per-tensor", "all"} <= set(em)
    assert arms["control, own text", "em"]["no-op"] == 12
    assert arms["others", "in_full"]["no-op"] == 1
    assert arms["heldout", "perplexity"]["no-op"] > 1
    assert [row["step"] for row in record["tables"]["recovery"] if row["arm"] == "edited"] == [
        0,
        1,
        2,
    ]
    assert {row["set"] for row in record["tables"]["noise"]} == {"memorized", "control"}


def test_unlearn_command(run, tmp_path):
    out, export = tmp_path / "out", tmp_path / "export"
    result = run(
        "unlearn", "--targets", "2", *SURFACE,
        "--out", str(out), "--export", str(export),
    )  # fmt: skip
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["values"]["changed"] <= record["values"]["masked"]
    measures = {(row["set"], row["measure"]): row for row in record["tables"]["measures"]}
    assert measures[("memorized", "em")]["before"] == 12
    assert measures[("memorized", "em")]["after"] < 2
    assert Edit.load(out / "edit.safetensors").n_changed == record["values"]["changed"]
    assert len(record["values"]["paragraphs"]) == 2
    modes = {path.stat().st_mode & 0o777 for path in export.iterdir()}
    assert modes == {(export / "config.json").stat().st_mode & 0o777}
    again = mc.load_model(export)
    recited = zoo.mixed(zoo.bridge("gpt_neo"), n=8)
    em = mc.scan(again, recited[:8], progress=False).em
    assert int((em < 2).sum()) >= 2


def test_unlearn_command_says_what_it_edited_and_why_it_ended(run, tmp_path):
    arguments = ["--recipe", "surface", "--kl-budget", "1e-9", "--out", str(tmp_path)]
    result = run("unlearn", *arguments, as_json=False)
    assert "another step would have passed --kl-budget" in result.stdout
    assert "edited: recited" in result.stdout
    assert "others still recited" in result.stdout
    lines = result.stdout.splitlines()
    (place,) = [i for i, line in enumerate(lines) if "what the model writes after" in line]
    assert lines[place + 1].startswith("  before:  <")
    assert any(line.startswith("  after:   <") for line in lines[place + 2 :])


def test_unlearning_is_deep_by_default(run, tmp_path):
    result = run("unlearn", "--out", str(tmp_path), quiet=False)
    assert result.exit_code == 0
    options = Edit.load(tmp_path / "edit.safetensors").provenance.options
    assert options["recipe"]["objective"] == "reference"
    assert "Next: memcircuits audit --model " in result.stderr
    assert f"--edit {tmp_path / 'edit.safetensors'}" in result.stderr


def test_edit_command(run, tmp_path):
    result = run("edit", "--fraction", "0.2", "--kl-budget", "0.5", "--out", str(tmp_path))
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert "em_new" in record["tables"]["steps"][0]
    (text,) = record["tables"]["texts"]
    assert text["em_wanted"] == record["tables"]["steps"][-1]["em_new"]
    assert text["before"] != text["after"]
    assert (tmp_path / "edit.safetensors").is_file()


def test_audit_command(run, tmp_path):
    zoo.save("gpt_neo", tmp_path / "twin", seed=1)
    edited, out = tmp_path / "edited", tmp_path / "out"
    result = run("unlearn", *SURFACE, "--out", str(edited))
    assert result.exit_code == 0
    file = ["audit", "--edit", str(edited / "edit.safetensors"), "--out", str(out)]
    small = ["--attacks", "1", "--relearning-steps", "1"]
    result = run(*file, *small, "--twin", str(tmp_path / "twin"))
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    schema = json.loads(Path(output.__file__).with_name("output.schema.json").read_text())
    jsonschema.validate(record, schema)
    measures = {row["measure"]: row for row in record["tables"]["measures"]}
    assert measures["em"]["unedited"] == 12
    assert measures["em"]["edited"] < 2
    assert record["values"]["reference"] == "twin"
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.safetensors"]
    result = run(*file, "--twin", str(tmp_path / "twin"), "--stand-in")
    assert result.exit_code == 2
    assert "--stand-in: given with --twin" in result.stderr
    # Other paragraphs than the edit's are refused.
    other = Edit.load(edited / "edit.safetensors")
    made_for = {**other.provenance.paragraphs, "memorized": {"n": 1, "hash": "other"}}
    provenance = dataclasses.replace(other.provenance, paragraphs=made_for)
    path = dataclasses.replace(other, provenance=provenance).save(tmp_path / "other.safetensors")
    result = run("audit", "--edit", str(path), "--stand-in", "--out", str(out))
    assert result.exit_code == 2
    assert "--paragraphs: not those that the edit was made for" in result.stderr


def test_targets_of_the_shipped_model_are_those_that_its_twin_never_saw():
    planted = mc.Paragraphs.shipped("planted")
    for seed in range(3):
        drawn = draw_targets(Inputs(), planted, 4, seed)
        assert set(drawn.metadata["role"]) == {"organism"}
    # Where these are too few, and where paragraphs are given, all count.
    few = planted[[i for i, role in enumerate(planted.metadata["role"]) if role == "both"]]
    assert set(draw_targets(Inputs(), few, 4, 0).metadata["role"]) == {"both"}
    given = draw_targets(Inputs(paragraphs=Path("file.jsonl")), planted, 40, 0)
    assert set(given.metadata["role"]) == {"both", "organism"}


def test_every_verdict_has_a_meaning():
    assert set(MEANINGS) == set(get_args(Verdict))
