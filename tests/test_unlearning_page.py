"""docs/unlearning.md is written from its numbers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_holds_the_numbers_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page import audits, page

    for name in ("unlearning.json", audits.NAME):
        shutil.copy(DOCS / name, tmp_path)
    numbers = tmp_path / "unlearning.json"
    page.write(numbers)
    written = numbers.with_suffix(".md").read_text("utf-8")
    assert written == (DOCS / "unlearning.md").read_text("utf-8")
    runs = json.loads(numbers.read_text("utf-8"))
    runs["surface/0"]["em_attacked"] = 7
    numbers.write_text(json.dumps(runs))
    page.write(numbers)
    assert numbers.with_suffix(".md").read_text("utf-8") != written


def test_the_audit_comes_first(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page import audits

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
    text = audits.section(record)
    cells = "0.25 [0, 3] | 1.25 [0, 3] | 1.25 [0, 3] | 1.25 [0, 3] | 2.25 [0, 3]"
    assert text.count(cells) == len(audits.MEASURES) + 1
    assert "2 hidden; 1 weakened" in text
    page = (DOCS / "unlearning.md").read_text("utf-8")
    assert page.index(f"## {audits.TITLE}") < page.index("## Depth against harm")


def test_a_rival_has_the_settings_that_forget_at_the_least_harm(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page import front

    runs = {}
    for name, (objective, (rate, weight), _) in front.tuning().items():
        is_first = (rate, weight) == (front.RATES[0], front.WEIGHTS[0])
        for i in range(front.N_TUNED):
            # One rival forgets with every setting, the other with none.
            em = (3, 2) if objective == "nll" else (20, 30)
            kl = 0.1 * rate * weight if objective == "nll" else 0.3 - 0.2 * is_first
            runs[f"{name}/{i}"] = {"em_attacked": em[is_first], "kl": kl}
    chosen = front.chosen_settings(runs)
    assert chosen["nll"] == (front.RATES[0], front.WEIGHTS[0])
    assert chosen["npo"] != (front.RATES[0], front.WEIGHTS[0])
