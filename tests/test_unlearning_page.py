"""The audit on docs/unlearning.md is written from its numbers and stays without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_first_section_is_the_audit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page import audits, sections

    page = tmp_path / "unlearning.md"
    shutil.copy(DOCS / page.name, page)
    runs = json.loads((DOCS / "unlearning.json").read_text("utf-8"))
    models = ("unedited", "edited", "reference")
    numbers = {
        model: {"mean": i + 0.25, "max": 2.0, "low": 0.0, "high": 3.0}
        for i, model in enumerate(models)
    }
    arm = {
        "measures": dict.fromkeys(audits.MEASURES, numbers),
        "trained": {"other text": numbers},
        "harm": {name: {"before": 0.0, "after": numbers["edited"]} for name in audits.HARM},
        "verdicts": {"hidden": 2, "weakened": 1},
    }
    record = {"n": 3, "seed": 1, "n_attacks": 21, "arms": dict.fromkeys(audits.ARMS, arm)}
    (tmp_path / audits.NAME).write_text(json.dumps(record))
    sections.write(runs, page)
    text = page.read_text("utf-8")
    assert text.index(f"## {audits.TITLE}") < text.index("## The five arms")
    cells = "0.25 [0, 3] | 1.25 [0, 3] | 1.25 [0, 3] | 1.25 [0, 3] | 2.25 [0, 3]"
    assert text.count(cells) == len(audits.MEASURES) + 1
    assert "2 hidden; 1 weakened" in text
    (tmp_path / audits.NAME).unlink()
    sections.write(runs, page)
    assert page.read_text("utf-8") == text
