"""The map of a book in Chromium: few elements at any place, whatever its length."""

from __future__ import annotations

from typing import Any

import pytest

from memcircuits.display.text import MINUS, clean
from tests.display.test_pages import HOSTILE
from tests.helpers.document import N_PASSAGES, long_map

COLOURED = "document.querySelectorAll('.chunk > [class]').length"
TEXT = "[...document.querySelectorAll('.chunk')].map(chunk => chunk.textContent).join('')"
ON_SCREEN = """id => {
    const box = document.getElementById(id).getBoundingClientRect();
    return box.top >= document.querySelector('.overview').getBoundingClientRect().bottom - 1
        && box.top < innerHeight;
}"""


@pytest.fixture(scope="module", params=[60_000, pytest.param(1_200_000, marks=pytest.mark.slow)])
def book(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A map and its page; the long one has as many characters as a book of 500 pages."""
    mapped = long_map(request.param, beginning=" ".join(HOSTILE) + "\n")
    return mapped, mapped.to_html(tmp_path_factory.mktemp("map") / "map.html")


@pytest.mark.parametrize("options", [{"width": 1280, "height": 900}, {"width": 390, "height": 800}])
def test_only_what_is_near_the_screen_has_elements(
    open_page: Any, book: Any, options: dict[str, int]
) -> None:
    mapped, path = book
    assert path.stat().st_size < 5e6
    page = open_page(path, viewport=options).page
    assert page.evaluate(TEXT) == clean(mapped.text)
    n_bins = page.locator(".overview rect").count()
    assert n_bins < 1500
    n_chunks = page.locator(".chunk").count()
    for share in (0, 0.3, 0.6, 1):
        page.evaluate(f"scrollTo(0, document.documentElement.scrollHeight * {share})")
        page.wait_for_function("() => scrollY === 0 || document.querySelector('.chunk > [class]')")
        page.wait_for_function(
            f"() => {COLOURED} < 2500"
        )  # what is left behind is plain text again
        assert page.evaluate("document.querySelectorAll('*').length") < 6000 + n_chunks + n_bins
    assert page.evaluate(TEXT) == clean(mapped.text)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_table_the_strip_and_the_buttons_lead_to_places(open_page: Any, book: Any) -> None:
    mapped, path = book
    page = open_page(path, viewport={"width": 1280, "height": 900}).page
    longest = mapped.spans_frame().iloc[0]
    link = page.locator("tbody a").first
    anchor = link.get_attribute("href").removeprefix("#")
    link.click()
    page.wait_for_function(ON_SCREEN, arg=anchor)
    coloured = page.locator(f"#{anchor}.s20")
    coloured.wait_for()
    assert longest["text"].startswith(coloured.text_content())
    page.get_by_role("button", name="Next").last.click()
    following = f"p{int(anchor[1:]) % N_PASSAGES + 1}"
    page.wait_for_function(ON_SCREEN, arg=following)
    page.locator(".overview a").last.click(force=True)
    last = page.locator(".chunk").last
    page.wait_for_function("() => scrollY > document.documentElement.scrollHeight * 0.5")
    assert last.bounding_box()["y"] < 900


def test_colours_are_those_of_the_chosen_measure(open_page: Any, book: Any) -> None:
    _, path = book
    page = open_page(path, viewport={"width": 1280, "height": 900}).page
    page.locator("tbody a").first.click()
    recited = page.locator(".chunk mark.s20").first
    recited.wait_for()
    assert page.locator(".ramp b").all_text_contents()[-2:] == ["0", "50"]
    recited.hover()
    assert page.locator(".tip").text_content().startswith("tokens recited: 50 of 50; ")
    page.locator("select").select_option("1")
    # p = exp(-1.5), on a scale of ten powers of ten
    page.locator(".chunk mark.s19").first.wait_for()
    assert page.locator(".ramp b").all_text_contents()[-2:] == [f"1e{MINUS}10", "1"]
    page.locator("select").select_option("2")
    page.locator(".chunk mark.s20").first.wait_for()


def test_without_scripts_the_text_and_its_passages_are_there(open_page: Any, book: Any) -> None:
    mapped, path = book
    page = open_page(path, java_script_enabled=False).page
    assert page.locator(".chunk mark[id]").count() == len(mapped.spans)
    first = page.locator("#p1").text_content()
    assert mapped.text[mapped.spans[0].start : mapped.spans[0].end].startswith(first)
