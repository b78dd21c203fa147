"""docs/make_companions.py on a tiny model: every section, and the page of their numbers."""

from __future__ import annotations

import importlib
import json

import pytest

from tests.helpers import ROOT
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("make_companions")


def test_the_page_holds_the_numbers_measured(maker):
    row = {"model": "organism", "n": 40, "seed": 0, "what": "AUC", "value": 0.1234567, "low": None}
    section = {
        "question": "Do they differ?",
        "paper": "A paper",
        "arxiv": "2403.00510",
        "paper_models": "a model",
        "paper_found": "they do",
        "measured": "The same.",
        "rows": [row, row | {"low": 0.1, "high": 0.2}, row | {"value": None}],
        "not_replicated": "",
        "seconds": 3,
    }
    page = maker.page({"contrast": section})
    assert "## `contrast`: do they differ?" in page
    assert "| organism | 40 | 0 | AUC | 0.123 |  |" in page
    assert "| organism | 40 | 0 | AUC | 0.123 | 0.1 to 0.2 |" in page
    assert "| organism | 40 | 0 | AUC |  |  |" in page


@pytest.mark.parametrize("name", ["contrast", "lookups", "cut_prefix", "influence", "core"])
def test_every_section_measures_what_it_is_given(maker, name, monkeypatch):
    from companions_page.subjects import QUICK, Subject

    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model, n_prefix=14)
    subject = Subject("tiny", model, paragraphs[:4], paragraphs[4:], QUICK)
    if name == "core":  # whose last subject is the planted organism
        module = importlib.import_module("companions_page.core")
        planted = Subject("planted", model, paragraphs[:4], paragraphs[4:], QUICK)
        monkeypatch.setattr(module, "shipped", lambda *_: planted)
        monkeypatch.setattr(module, "HEAD", "L1H2")
    section = maker.measure(name, [subject])
    assert len(section["rows"]) > 4
    assert {row["model"] for row in section["rows"]} >= {"tiny"}
    assert any(row["low"] is not None for row in section["rows"])
    page = maker.page(json.loads(maker.to_json({name: section})))
    assert page.count("| tiny |") == sum(row["model"] == "tiny" for row in section["rows"])


def test_an_unknown_section_is_refused(maker, capsys):
    with pytest.raises(SystemExit):
        maker.main(["lookup"])
    assert "lookup: no such section; choose from contrast, lookups" in capsys.readouterr().err
