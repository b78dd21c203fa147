"""Recited passages as text: snippets, tables in notebooks, and the page of a scan."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import memcircuits as mc
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.recitation_statistics import em_ranges
from memcircuits.measure.scan_page import HARDLY, MEMORIZED, composition_of_controls, kinds_of
from memcircuits.measure.scanning import Scan
from memcircuits.measure.snippets import passage_text, snippet
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def scan() -> Scan:
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model, n=3)
    known = {
        "role": ("planted",) * 3 + ("control",) * 3,
        "repetitions": (64, 8, 8, 0, 0, 3),
        "source": ("<script>alert(1)</script>",) * 6,
    }
    named = Paragraphs(paragraphs.ids, paragraphs.n_prefix, paragraphs.names, known)
    return mc.scan(model, named, progress=False)


def test_the_parts_of_a_passage_join_to_its_text(scan: Scan) -> None:
    tokenizer = zoo.tokenizer()
    for row in range(len(scan.names)):
        ids, em = scan.ids[row].tolist(), int(scan.em[row])
        text = passage_text(ids, scan.n_prefix, em, tokenizer)
        joined = "".join(text)
        assert re.findall(r"<\d+>", joined) == [f"<{i}>" for i in ids]
        assert len(re.findall(r"<\d+>", text.recited)) == em
        given, _, continuation = snippet(text).partition(" | ")
        assert text.prefix.endswith(given.removeprefix("…"))
        assert (text.recited + text.remainder).startswith(continuation[:20])
    assert passage_text([5, 7], 1, 1, None) == ("5 ", "7 ", "")


def test_the_longest_recitations_come_first_in_notebooks(scan: Scan) -> None:
    longest = scan.longest(4)
    order = np.lexsort((scan.nll.numpy(), -scan.em.numpy()))[:4]
    assert longest["id"].tolist() == [scan.names[i] for i in order]
    shown = scan._repr_html_()
    assert shown.index(scan.names[order[0]]) < shown.index(scan.names[order[3]])
    assert "&lt;" in shown
    assert "paragraphs of 10 + 12 tokens" in scan.paragraphs._repr_html_()
    table = mc.UnigramTable.from_tokens(scan.ids, 101)._repr_html_()
    counts = np.bincount(scan.ids.flatten().numpy())
    assert f"<td>{counts.argmax()}</td><td>{counts.max()}</td>" in table


@pytest.mark.parametrize("n", [1, 2, 7, 12, 50])
def test_ranges_cover_every_em_in_order(n: int) -> None:
    names = em_ranges(np.arange(n + 1), n)
    assert names[0] == "0"
    assert names[-1] == str(n)
    bounds = [tuple(map(int, (name.split("-") * 2)[:2])) for name in dict.fromkeys(names)]
    assert [low for low, _ in bounds[1:]] == [high + 1 for _, high in bounds[:-1]]
    assert len(bounds) <= 12
    place = dict(zip(dict.fromkeys(names), bounds, strict=True))
    assert all(place[name][0] <= em <= place[name][1] for em, name in enumerate(names))


def test_controls_are_told_by_role_and_by_times_seen(scan: Scan) -> None:
    kinds = kinds_of(scan)
    assert kinds == [MEMORIZED] * 3 + [HARDLY] * 3
    table = composition_of_controls(scan.to_frame().assign(kind=kinds))
    rows = {(r["role"], r["seen"]): r["n"] for r in table.to_dict("records")}
    assert rows == {("control", "never"): 2, ("control", "2 to 7"): 1}


def test_a_page_holds_every_passage_and_no_markup_of_theirs(scan: Scan, tmp_path: Path) -> None:
    page = scan.to_html(tmp_path / "scan.html").read_text("utf-8")
    assert page.count("<article") == 6
    assert "<script>alert" not in page
    assert "word for word for 3 of 6 passages" in page
    assert "seen 64 times in training" in page
    first = scan.longest(1).loc[0, "id"]
    assert page.index(f">{first}</a>") < page.index(f">{scan.names[5]}</a>")
    scan.save(tmp_path / "scan.safetensors")
    loaded = Scan.load(tmp_path / "scan.safetensors")
    without = loaded.to_html(tmp_path / "ids.html").read_text("utf-8")
    assert "Token ids, because the model has no tokenizer" in without
    with_model = loaded.to_html(tmp_path / "again.html", model=zoo.tokenizer()).read_text("utf-8")
    articles = re.compile("<article.*</article>", re.DOTALL)
    assert articles.findall(with_model) == articles.findall(page)


def test_what_was_asked_for_and_the_records_own_columns_are_shown(tmp_path: Path) -> None:
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model, n=2)
    known = {"record": ("R1", "R2", "R3", "R4"), "all": ("x",) * 4, "note": ("long " * 9,) * 4}
    named = Paragraphs(paragraphs.ids, paragraphs.n_prefix, paragraphs.names, known)
    sampler = mc.Sampler(temperature=0.05, top_k=40)
    scan = mc.scan(model, named, sampler=sampler, near_verbatim=True, progress=False)
    longest = scan.longest(4)
    assert list(longest) == ["id", "em", "nll", "samples", "similarity", "record", "text"]
    row = scan.names.index(longest.loc[0, "id"])
    assert longest.loc[0, "record"] == known["record"][row]
    page = scan.to_html(tmp_path / "scan.html").read_text("utf-8")
    assert page.count("temperature 0.05, top-k 40") == 2, "how to read it, and what was run"
    article = page[page.index("<article") : page.index("</article>")]
    assert f"{longest.loc[0, 'samples']:,.0f} samples; similarity 1.00; record R" in article
    assert "over 1e+12 samples" in page


def test_a_ranking_is_the_same_from_a_scan_and_from_paragraphs(scan: Scan) -> None:
    model = zoo.bridge("gpt_neo")
    options = {"draws": 20, "progress": False}
    by_scan = mc.find_memorization_heads(model, scan, **options)
    by_paragraphs = mc.find_memorization_heads(model, scan.paragraphs, **options)
    assert by_scan.score.equal(by_paragraphs.score)
    assert by_scan.counts == by_paragraphs.counts
    with pytest.raises(mc.InputError, match="its weights are other ones"):
        mc.find_memorization_heads(zoo.bridge("gpt_neo", seed=1), scan, **options)
