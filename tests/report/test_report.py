"""The report of a ranking: complete, true to the numbers, small, and repeatable as it says."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.report.ranking_page import ranking_page
from memcircuits.report.rerun import commands
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def ranking(neo):
    return mc.find_memorization_heads(neo, zoo.mixed(neo, n=6), draws=200, progress=False)


@pytest.fixture(scope="module")
def page(neo, ranking):
    return ranking_page(ranking, neo, progress=False).render()


def sections(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)]


def test_the_story_is_complete(page, ranking):
    assert sections(page) == [
        "How to read this",
        "Every head",
        "Evidence",
        "Gradients by layer",
        "Trigger tokens",
        "Attention of the top heads",
        "Memorized paragraphs measured",
        "What was run",
        "Run it again",
    ]
    text = html.unescape(page)
    assert ranking.summary() in text
    assert f"for {ranking.counts['memorized']} of {ranking.counts['given']} paragraphs" in text
    for fact in ("seed", "basis", "time", "transformer-lens (version)", "memcircuits (version)"):
        assert f"<dt>{fact}</dt>" in text
    assert ranking.provenance.model["fingerprint"] in text


def test_the_lead_names_the_head_or_says_that_none_is_significant(neo, ranking):
    lead = ranking_page(ranking, neo, triggers=0, progress=False).lead
    head = ranking.top(1)[0]
    rigged = dataclasses.replace(ranking, p_value=torch.ones_like(ranking.p_value))
    none = ranking_page(rigged, neo, triggers=0, progress=False).lead
    assert "No single attention head is significant" in none
    rigged.p_value[head] = 1e-6
    lost = -float(ranking.evidence["em_memorized"][head])
    lead = ranking_page(rigged, neo, triggers=0, progress=False).lead
    assert f"attention head {head} " in lead
    assert f"{lost:.1f} of the 12 tokens" in lead


def test_trigger_tokens_are_those_of_perturb_prefix(neo, ranking):
    blocks = ranking_page(ranking, neo, triggers=2, progress=False).blocks
    strips = [block for block in blocks if type(block).__name__ == "Tokens"]
    nll = mc.scan(neo, ranking.memorized).nll
    surest = ranking.memorized[nll.argsort(stable=True)[:2]]
    found = mc.perturb_prefix(neo, surest, draws=2, seed=0, progress=False)
    assert len(strips) == 2
    for i, block in enumerate(strips):
        values = torch.tensor(block.strip.values)
        torch.testing.assert_close(values[:10], found.drops[i].clamp_min(0))
        assert values[10:].isnan().all()
        worst = int(found.drops[i].argmax())
        assert f"(token {worst})" in block.note
    assert "Trigger tokens" not in sections(
        ranking_page(ranking, neo, triggers=0, progress=False).render()
    )


def test_evidence_has_every_head_and_columns_that_sort(page, ranking):
    table = page[page.index("<h2>Evidence") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 17
    names = re.findall(r"<td>(L\d+H\d+)</td>", table)
    assert names == [str(head) for head in ranking.top(16)]
    assert table.count('<th scope="col"') == table.count("<button") == 13


def test_10_000_paragraphs_make_no_megabytes_of_rows(neo, ranking):
    big = zoo.random_ids(3000, 22)
    counts = {**ranking.counts, "given": 10_000, "memorized": 3000}
    names = {**ranking.names, "memorized": tuple(f"p{i}" for i in range(3000))}
    many = dataclasses.replace(ranking, memorized_ids=big, names=names, counts=counts)
    page = ranking_page(many, neo, progress=False).render()
    assert "3,000 of 10,000 paragraphs" in page
    assert "the first 200 are listed" in page
    assert page.count("<tr>") < 300
    assert len(page.encode()) < 2_000_000


def test_the_python_told_in_the_report_makes_the_same_ranking(neo, ranking, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mc, "load_model", lambda name: neo)
    read = []

    def reading(path, model, **lengths):
        read.append((path, lengths))
        return zoo.mixed(neo, n=6)

    monkeypatch.setattr(mc.Paragraphs, "read", reading)
    told = commands(ranking)
    assert not told[0].startswith("memcircuits")  # the command line has no --draws
    names: dict = {}
    exec("\n".join(told), names)
    assert names["ranking"].to_frame().equals(ranking.to_frame())
    assert read == [("FILE", {"n_prefix": 10, "n_continuation": 12})]
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_the_command_told_in_the_report_is_one_that_exists(neo):
    given = mc.find_memorization_heads(
        neo, zoo.mixed(neo, n=4), control=zoo.mixed(neo, n=6)[[6, 7, 8, 9]], progress=False
    )
    shell = commands(given)[0].split()
    assert shell[:2] == ["memcircuits", "heads"]
    assert {"--control", "--seed", "--mode", "--n-prefix", "--paragraphs"} <= set(shell)
    options = CliRunner().invoke(app, ["heads", "--help"], env={"COLUMNS": "200"}).output
    for word in shell:
        assert not word.startswith("--") or word in options


def test_another_models_report_is_refused(ranking, tmp_path):
    with pytest.raises(mc.InputError, match="the ranking is of weights"):
        ranking.to_html(tmp_path / "r.html", model=zoo.bridge("gpt_neo", seed=1))


def test_attention_beside_the_perturbed_paragraph(neo, ranking):
    pair = mc.perturb_prefix(neo, ranking.memorized[0], draws=2, progress=False).pairs()
    view = ranking.attention(pair.clean, compare=pair.corrupted, heads=99)
    assert len(view.head_names) == 16
    assert view.compare is not None
    assert view.compare.title == f"{view.title}, perturbed"
    left, right = ([token["differs"] for token in v["tokens"]] for v in contexts(view))
    changed = (pair.clean.ids != pair.corrupted.ids)[0].tolist()
    assert sum(changed[:10]) == 1
    parts = changed.index(True, 10)
    assert left == right == [*changed[: parts + 1], *[False] * (21 - parts)]


def contexts(view):
    from memcircuits.display.pages import Attention

    return Attention(view).context()["views"]


def test_report_command(neo, ranking, tmp_path):
    zoo.hf_model("gpt_neo").save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    ranking.save(tmp_path / "ranking.safetensors")
    arguments = [
        "report",
        str(tmp_path / "ranking.safetensors"),
        "--model",
        str(tmp_path / "model"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--heads", "16", "--triggers", "1"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page)[0])
    assert len(data["heads"]) == 16
    assert str(tmp_path) not in page
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "none.safetensors")])
    assert missing.exit_code == 2
    assert "there is no such file" in missing.output
