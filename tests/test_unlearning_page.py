"""docs/unlearning.md is written from its numbers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

from memcircuits.editing.masks import Candidates
from memcircuits.models.registry import adapt

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
        model: {"mean": i + 0.25, "min": 0.5, "max": 2.0, "low": 0.0, "high": 3.0}
        for i, model in enumerate(models)
    }
    arm = {
        "measures": dict.fromkeys(audits.MEASURES, numbers),
        "trained": {"other text": numbers},
        "harm": {name: {"before": 0.0, "after": numbers["edited"]} for name in audits.HARM},
        "verdicts": {"hidden": 2, "weakened": 1},
        "n": 3,
        "n_attacks": 21,
    }
    text = audits.section(
        {"seed": 1, "arms": dict.fromkeys(audits.ARMS, arm) | {"deep": arm | {"n": 9}}}
    )
    cells = "0.25 [0, 3] | 1.25 [0, 3] | 1.25 [0, 3] | 1.25 [0, 3] | 2.25 [0, 3]"
    assert text.count(cells) == len(audits.MEASURES) + 1
    assert "2 hidden; 1 weakened" in text
    assert "| paragraphs |  | 9 | 3 | 9 | 3 | 9 |" in text
    assert "The worst of the 9 paragraphs that were forgotten deeply: 2 tokens" in text
    assert "a depth of 0.50." in text
    page = (DOCS / "unlearning.md").read_text("utf-8")
    assert page.index(f"## {audits.TITLE}") < page.index("## Depth against harm")


def test_audits_are_kept_one_by_one_and_summed_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page import audits
    from unlearning_page.numbers import unpack

    kept = json.loads((DOCS / audits.NAME).read_text("utf-8"))
    assert audits.summary(kept["audits"]) == kept["arms"]
    monkeypatch.setattr(audits, "setting", lambda: SimpleNamespace(fingerprint=kept["weights"]))
    unpack(kept["audits"], tmp_path / "audited")
    audits.save(tmp_path, tmp_path / audits.NAME)
    assert json.loads((tmp_path / audits.NAME).read_text("utf-8")) == kept
    assert audits.jobs(1, 2) == [("surface", 0), ("deep", 0), ("deep, twin given", 0), ("deep", 1)]


def test_a_rival_has_the_settings_that_forget_at_the_least_harm(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page import front

    runs = {}
    for name, (rival, settings, _) in front.tuning().items():
        first = front.RIVALS[rival].grid[0]
        for i in range(front.N_TUNED):
            # One rival forgets with every setting, the others with none.
            em = (20, 3) if rival == "nll" else (30, 20)
            kl = 0.1 * (1 + front.RIVALS[rival].grid.index(settings)) if rival == "nll" else 0.3
            runs[f"{name}/{i}"] = {"em_attacked": em[settings == first], "kl": kl}
    chosen = front.chosen_settings(runs)
    assert chosen == {name: rival.grid[0] for name, rival in front.RIVALS.items()}
    runs = {name: run | {"em_attacked": 4} for name, run in runs.items()}
    assert front.chosen_settings(runs)["nll"] == front.RIVALS["nll"].grid[0]


def test_all_of_the_curvature_is_the_matrix_and_little_of_it_the_sharpest_pair(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page.removal import of_much_curvature

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    moments = torch.diag(torch.tensor([1.0, 5.0, 2.0])), torch.diag(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(of_much_curvature(matrix, *moments, 1.0), matrix)
    kept = of_much_curvature(matrix, *moments, 15 / 32)  # the products are 15 6 5 3 2 1
    expected = torch.zeros_like(matrix)
    expected[1, 0] = matrix[1, 0]
    torch.testing.assert_close(kept, expected)
    kept = of_much_curvature(matrix, *moments, 16 / 32)
    expected[2, 0] = matrix[2, 0]
    torch.testing.assert_close(kept, expected)


def test_a_subnet_lacks_the_weights_of_the_smallest_scores(monkeypatch, neo):
    monkeypatch.syspath_prepend(DOCS)
    from unlearning_page.removal import write_subnet

    mask = Candidates.of(adapt(neo), components=["W_in"]).choose(1.0, None, "all")
    original = [weight.values[0].clone() for weight in mask.weights]
    scores = [torch.arange(old.numel(), dtype=torch.float32).view_as(old) for old in original]
    with mask.restored():
        write_subnet(mask, original, [-score for score in scores], 0.25)
        for weight, old, score in zip(mask.weights, original, scores, strict=True):
            is_kept = score >= old.numel() // 4
            assert torch.equal(weight.values[0], old * is_kept)
