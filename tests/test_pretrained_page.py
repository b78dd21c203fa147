"""docs/make_pretrained.py: the page is that of its numbers, and its windows are what it says."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

import memcircuits as mc
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("make_pretrained")


def test_the_page_is_that_of_its_numbers(maker, tmp_path, monkeypatch):
    for name in ("pretrained.json", "pretrained.md"):
        (tmp_path / name).write_text((ROOT / "docs" / name).read_text("utf-8"), "utf-8")
    written = (tmp_path / "pretrained.md").read_text("utf-8")
    monkeypatch.setattr(maker, "DOCS", tmp_path)
    maker.main("--text")
    assert (tmp_path / "pretrained.md").read_text("utf-8") == written


def test_both_texts_are_measured_passage_by_passage(maker, tmp_path, monkeypatch):
    """On the organism, which knows neither text."""
    recited = importlib.import_module("pretrained_page.recited")
    organism = mc.load_model()
    monkeypatch.setattr(recited, "example", lambda: SimpleNamespace(gemma3=lambda: "organism"))
    monkeypatch.setattr(mc, "load_model", lambda name: organism)
    monkeypatch.setattr(recited, "PICTURE", tmp_path / "map.png")
    monkeypatch.setattr(recited, "take_picture", lambda page: None)
    measured = json.loads(json.dumps(recited.measure(), allow_nan=False))
    assert [row["recited"] for row in measured["windows"].values()] == [0, 0, 0]
    assert {row["n_passages"] for row in measured["windows"].values()} == {9}
    n_windows = measured["windows"]["nine passages"]["n"]
    assert sum(row["n"] for row in measured["passages"]) == n_windows
    assert [row["title"] for row in measured["passages"]] == list(recited.TITLES)
    known, control = (recited.windows_of(organism, name, 6) for name in ("known", "control"))
    assert not set(known.metadata["group"]) & set(control.metadata["group"])
    assert torch.equal(known[:1].ids, recited.windows_of(organism, "known", 10_000)[:1].ids)


def test_the_edit_of_a_planted_paragraph_is_audited(maker, monkeypatch):
    """On the organism, at the surface only: the rows are those of the audit."""
    forgotten = importlib.import_module("pretrained_page.forgotten")
    module = importlib.import_module("pretrained_page.planted").example()
    lengths = {"n_prefix": 12, "n_continuation": 8}
    fields = {"LENGTHS": lengths, "WHERE": "L3.attn", "smollm2": lambda: "organism"}
    for name, value in fields.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(forgotten, "example", lambda: module)
    for name, value in {"ARMS": ("surface",), "ATTACKS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(forgotten, name, value)
    measured = json.loads(json.dumps(forgotten.measure(), allow_nan=False))
    surface = measured["arms"]["surface"]
    unedited, edited, unplanted = surface["measures"]["em"]
    assert unedited == 8
    assert max(edited, unplanted) < 8
    assert surface["measures"]["depth"][0] == 0
    assert surface["measures"]["depth"][2] == 1
    lines = forgotten.text(measured)
    assert lines[0] == "## Forgetting one of them"
    (row,) = [line for line in lines if line.startswith("| EM from the own prefix")]
    assert row.endswith(f"| {unedited:.3g} | {edited:.3g} | {unplanted:.3g} |")
