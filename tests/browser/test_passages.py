"""Passages and their cloud of points in Chromium: search, filter, order, pages, links, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memcircuits.display.pages import Page, Passage, Passages, Scatter
from tests.display.test_pages import HOSTILE

N = 45
SHOWN = "[...document.querySelectorAll('.passages article')].filter(a => !a.hidden).map(a => a.id)"


def passage(index: int) -> Passage:
    kind = "memorized" if index < 30 else "hardly recited"
    hostile = HOSTILE[index % len(HOSTILE)]
    recited = f"needle{index} {hostile}"
    return Passage(
        f"text-{index}", kind, "what was given", recited, " and on", 50 - index, index / 9
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    frame = pd.DataFrame({"nll": range(N), "em": range(N, 0, -1), "id": map(str, range(N))})
    frame["place"] = [f"#passage-{i}" for i in range(N)]
    blocks = [
        Scatter(frame, "nll", "em", label="id", href="place", title="Points"),
        Passages([passage(i) for i in range(N)], 50, N + 5, title="Passages"),
    ]
    return Page("Passages", blocks).save(tmp_path / "page.html")


def shown(page: Any) -> list[int]:
    return [int(place.removeprefix("passage-")) for place in page.evaluate(SHOWN)]


def test_passages_are_searched_filtered_and_sorted(open_page: Any, path: Path) -> None:
    page = open_page(path, viewport={"width": 1280, "height": 900}).page
    assert shown(page) == list(range(20))
    page.get_by_role("button", name="Next").click()
    assert shown(page) == list(range(20, 40))
    page.get_by_label("Search").fill("NEEDLE7 given")
    assert shown(page) == [7]
    page.get_by_label("Search").fill("nowhere")
    assert page.get_by_text("No passage has these words.").is_visible()
    page.get_by_label("Search").fill("")
    page.get_by_label("Show").select_option("hardly recited")
    assert shown(page) == list(range(30, 45))
    page.get_by_label("Order").select_option("by name")
    assert shown(page)[0] == 30
    page.get_by_label("Show").select_option("all")
    page.get_by_label("Order").select_option("lowest loss first")
    assert shown(page) == list(range(20))
    assert page.get_by_text("5 are left out of this page").is_visible()


def test_a_point_and_an_address_lead_to_a_passage(open_page: Any, path: Path) -> None:
    page = open_page(path, viewport={"width": 1280, "height": 900}).page
    page.get_by_label("Search").fill("needle1")
    page.locator(".point a").nth(33).click()
    assert 33 in shown(page)
    assert page.evaluate("location.hash") == "#passage-33"
    box = page.locator("#passage-33").bounding_box()
    assert 0 <= box["y"] < 900


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(open_page: Any, path: Path, scheme: str) -> None:
    page = open_page(path, viewport={"width": 390, "height": 800}, color_scheme=scheme).page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    given, ground = page.evaluate(
        "['.given', 'body'].map(s => getComputedStyle(document.querySelector(s)))"
        ".map((style, i) => i ? style.backgroundColor : style.color)"
    )
    assert given != ground


def test_without_scripts_and_on_paper_all_passages_stand_there(open_page: Any, path: Path) -> None:
    page = open_page(path, java_script_enabled=False).page
    assert page.locator(".passages article").count() == N
    assert page.locator(".passages article >> visible=true").count() == N
    assert not page.locator(".controls").is_visible()
