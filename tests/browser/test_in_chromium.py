"""Pages as a reader meets them: opened from a file in Chromium with the network cut off.

Every test also fails on any console error, dialog, or request other than for the file itself
(`conftest.open_page` checks that at its end).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memcircuits as mc
from memcircuits.display import figures
from memcircuits.display.pages import Attention, Heatmap, Lines, Page, Prose, Table
from memcircuits.display.text import clean, visible
from tests.display.test_pages import HOSTILE, make_page, make_view
from tests.helpers import models as zoo

INK = """canvas => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let blue = 0;
    for (let i = 0; i < data.length; i += 4) {
        if (data[i + 3] > 0 && data[i + 2] > data[i] + 40) blue++;
    }
    return blue;
}"""


def drawn(page: Any, within: str = "") -> Any:
    """CircuitsVis' canvas, once the reader has scrolled to it and it has ink."""
    place = page.locator(f"{within} .cv".strip()).first
    place.scroll_into_view_if_needed()
    canvas = place.locator("canvas")
    canvas.wait_for()
    page.wait_for_function(f"canvas => ({INK})(canvas) > 50", arg=canvas.element_handle())
    return canvas


def test_circuitsvis_draws_and_follows_the_chosen_head(open_page: Any, tmp_path: Path) -> None:
    path = tmp_path / "view.html"
    make_view(12, 40).to_html(path)
    page = open_page(path, viewport={"width": 700, "height": 300}).page
    assert page.locator(".cv canvas").count() == 0  # not before it is seen
    canvas = drawn(page)
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    title = page.locator(".cv-title")
    assert title.text_content() == "L0H0: a row is a query, a column a key"
    page.get_by_role("button", name="L0H5").click()
    assert title.text_content().startswith("L0H5")
    page.wait_for_function(
        "([canvas, before]) => canvas.toDataURL() !== before", arg=[canvas.element_handle(), before]
    )
    assert page.get_by_role("button", name="L0H5").get_attribute("aria-pressed") == "true"
    assert "Under L0H5" in page.locator(".looks").text_content()


def test_head_chosen_before_the_view_is_drawn(open_page: Any, tmp_path: Path) -> None:
    path = tmp_path / "view.html"
    make_view(3, 20).to_html(path)
    page = open_page(path, viewport={"width": 700, "height": 300}).page
    page.get_by_role("button", name="L0H2").click()
    drawn(page)
    page.locator(".cv h2", has_text="L0H2").wait_for(state="attached")  # CircuitsVis' own, hidden
    assert page.locator(".cv-title").text_content().startswith("L0H2")
    assert page.get_by_role("button", name="L0H2").get_attribute("aria-pressed") == "true"
    assert page.get_by_role("button", name="L0H0").get_attribute("aria-pressed") == "false"


def test_thumbnails_differ_by_head(open_page: Any, tmp_path: Path) -> None:
    path = tmp_path / "view.html"
    make_view(144, 24).to_html(path)
    page = open_page(path).page
    page.wait_for_function("document.querySelectorAll('.thumbs canvas')[143].width === 24")
    images = page.eval_on_selector_all(".thumbs canvas", "all => all.map(c => c.toDataURL())")
    assert len(set(images)) == 144


def test_clicking_a_token_shows_what_it_attends_to(open_page: Any, tmp_path: Path) -> None:
    view = make_view(2, 12)
    path = tmp_path / "view.html"
    view.to_html(path)
    page = open_page(path).page
    tokens = page.locator("button.token")
    page.locator(".token.chosen").wait_for()
    tokens.nth(9).click()
    row = view.patterns[0, 9].numpy()
    best = int(row.argmax())
    first = page.locator(".looks li").first.text_content()
    assert first == f"·w{best} (token {best}): {row[best]:.3f}"
    assert "s20" in tokens.nth(best).get_attribute("class")
    assert "none" in tokens.nth(11).get_attribute("class")  # the future is not seen
    for key, place in {"ArrowLeft": 8, "Home": 0, "End": 11, "ArrowUp": 5}.items():
        page.keyboard.press(key)
        assert f"token {place} " in page.locator(".looks p").text_content()
        assert tokens.nth(place).evaluate("token => token === document.activeElement")
    page.locator("select").select_option("0")
    assert "s20" in tokens.nth(11).get_attribute("class")  # the rarest token
    assert page.locator(".ramp b").all_text_contents() == ["1", "9"]
    page.locator("select").select_option("1")
    assert "none" in tokens.nth(0).get_attribute("class")  # nothing comes before it


def test_views_side_by_side_move_together(open_page: Any, tmp_path: Path) -> None:
    path = tmp_path / "pair.html"
    make_view(3, 10, title="memorized", compare=make_view(3, 10, title="perturbed")).to_html(path)
    page = open_page(path, viewport={"width": 1200, "height": 900}).page
    left, right = page.locator(".view").all()
    page.locator(".token.chosen").nth(1).wait_for()
    right.get_by_role("button", name="L0H2").click()
    left.locator("button.token").nth(4).click()
    for view in (left, right):
        assert "Under L0H2, the query token 4" in view.locator(".looks").text_content()
    assert left.bounding_box()["y"] == right.bounding_box()["y"]


def test_views_side_by_side_have_one_scale(open_page: Any, tmp_path: Path) -> None:
    """The same colour means the same attention on both sides."""
    sharp, flat = make_view(1, 8), make_view(1, 8)
    uniform = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    flat = dataclasses.replace(flat, patterns=uniform[None])
    pattern = torch.eye(8)[None]
    dataclasses.replace(sharp, patterns=pattern, compare=flat).to_html(tmp_path / "pair.html")
    page = open_page(tmp_path / "pair.html", viewport={"width": 1200, "height": 900}).page
    page.locator(".token.chosen").nth(1).wait_for()
    assert page.locator(".view .ramp b").all_text_contents() == ["0", "1.00"] * 2
    own = round(20 * float(flat.patterns[0, 3, 3]))  # query 3 predicts the continuation
    left, right = page.locator(".view").all()
    assert "s20" in left.locator("button.token").nth(3).get_attribute("class").split()
    assert f"s{own}" in right.locator("button.token").nth(3).get_attribute("class").split()


def test_what_is_printed_before_scrolling_is_drawn(open_page: Any, tmp_path: Path) -> None:
    words = [f"word {i}" for i in range(200)]
    view = make_view(2, 12)
    path = Page("p", [Prose(words), Attention(view)]).save(tmp_path / "view.html")
    page = open_page(path, viewport={"width": 700, "height": 300}).page
    assert page.locator(".thumbs canvas").first.evaluate("canvas => canvas.width") == 1
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".thumbs canvas").first.evaluate("canvas => canvas.width") == 12
    assert page.locator("select").input_value() == "-1"


def test_without_scripts_colours_have_their_name(open_page: Any, tmp_path: Path) -> None:
    path = tmp_path / "view.html"
    make_view(2, 12).to_html(path)
    page = open_page(path, java_script_enabled=False).page
    assert page.locator("select option:checked").text_content() == "unigram rarity (nats)"
    assert page.locator(".ramp b").all_text_contents() == ["1", "9"]
    assert "s20" in page.locator("button.token").last.get_attribute("class")  # the rarest
    assert page.locator(".needs-script:visible").count() == 0


def test_rows_are_searched_filtered_and_saved(open_page: Any, tmp_path: Path) -> None:
    names = [f"L{i}" for i in range(12)]
    frame = pd.DataFrame(
        {"head": names, "significant": [i % 2 == 0 for i in range(12)], "score": np.arange(12) / 7}
    )
    frame.loc[4, "head"] = '=1+1,"<b>'
    path = Page("A page", [Table(frame, page_size=5, title="Heads")]).save(tmp_path / "t.html")
    page = open_page(path, accept_downloads=True).page

    def shown() -> list[str]:
        return page.locator("tbody tr:visible td:first-child").all_text_contents()

    page.get_by_label("significant").select_option("yes")
    assert shown() == ["L0", "L2", '=1+1,"<b>', "L6", "L8"]
    assert "of 6 rows" in page.locator(".pager").text_content()
    page.get_by_label("Search the table").fill("l1")
    assert shown() == ["L10"]
    page.get_by_label("Search the table").fill("=1")
    saved = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as info:
            page.get_by_role("button", name=kind).click()
        saved[kind] = Path(info.value.path()).read_text(encoding="utf-8")
        assert info.value.suggested_filename == f"a-page-heads.{kind.lower()}"
    # A spreadsheet must not take a text for a formula.
    assert saved["CSV"] == 'head,significant,score\n"\'=1+1,""<b>",1,0.571428571\n'
    assert json.loads(saved["JSON"]) == [
        {"head": '=1+1,"<b>', "significant": "1", "score": 0.571428571}
    ]


def test_a_chart_is_saved_as_it_looks(open_page: Any, tmp_path: Path) -> None:
    path = Page("p", [Heatmap([[1.0, -2.0]], "score")]).save(tmp_path / "map.html")
    page = open_page(path, accept_downloads=True).page
    with page.expect_download() as info:
        page.get_by_role("button", name="SVG").click()
    root = ElementTree.parse(info.value.path()).getroot()
    fills = [rect.get("fill") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(set(fills)) == 3  # the ground and two colours, written out
    assert all("class" not in element.attrib for element in root.iter())


@pytest.mark.parametrize("keyboard", [False, True], ids=["mouse", "keyboard"])
def test_sorting_sorts_and_pages_turn(open_page: Any, tmp_path: Path, keyboard: bool) -> None:
    scores = np.array([0.5, -2.0, np.nan, 1e-7, 3.25, -0.5, 1200.0])
    frame = pd.DataFrame({"head": [f"L{i}" for i in (10, 9, 2, 1, 0, 3, 11)], "score": scores})
    path = Page("p", [Table(frame, page_size=4, title="Heads")]).save(tmp_path / "table.html")
    page = open_page(path).page

    def press(name: str) -> None:
        button = page.get_by_role("button", name=name)
        if keyboard:
            button.focus()
            page.keyboard.press("Enter")
        else:
            button.click()

    def shown() -> list[str]:
        return page.locator("tbody tr:visible td:first-child").all_text_contents()

    assert shown() == ["L10", "L9", "L2", "L1"]
    press("score")
    assert shown() == ["L11", "L0", "L10", "L1"]
    assert page.locator("th").nth(1).get_attribute("aria-sort") == "descending"
    press("Next")
    assert shown() == ["L3", "L9", "L2"]  # the missing one last
    assert "5 to 7 of 7 rows" in page.locator(".pager").text_content()
    assert page.get_by_role("button", name="Next").is_disabled()
    press("score")
    assert shown() == ["L9", "L3", "L1", "L10"]
    press("head")
    assert shown() == ["L0", "L1", "L2", "L3"]


@pytest.mark.parametrize("width", [1200, 360])
def test_hostile_tokens_are_shown_as_text(open_page: Any, tmp_path: Path, width: int) -> None:
    tokens = [*HOSTILE, *[f"<b>{t}" for t in HOSTILE]]
    path = make_page(" ".join(HOSTILE), tokens).save(tmp_path / "hostile.html")
    page = open_page(path, viewport={"width": width, "height": 800}).page
    drawn(page)
    shown = page.locator("button.token").all_text_contents()
    assert shown == [visible(t) for t in tokens]
    for index in range(0, len(tokens), 5):
        page.locator("button.token").nth(index).click()
    assert page.locator("b:not(.ramp b), img, body script[src], [onmouseover]").count() == 0
    canvas = page.locator(".cv canvas")
    canvas.hover(position={"x": 60, "y": 60})  # CircuitsVis' own tooltip
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.sampled_from(HOSTILE),
            st.text(max_size=40),
            st.text(alphabet="<>/!-&;\"'`=\\ \n\0\u2028\u202escriptmgonex{}", max_size=60),
        ),
        min_size=3,
        max_size=12,
    )
)
def test_generated_tokens_are_shown_as_text(
    open_page: Any, tmp_path_factory: pytest.TempPathFactory, tokens: list[str]
) -> None:
    text = " ".join(tokens)
    path = make_page(text, tokens).save(tmp_path_factory.mktemp("generated") / "page.html")
    watched = open_page(path)
    page = watched.page
    drawn(page)
    assert page.locator("button.token").all_text_contents() == [visible(t) for t in tokens]
    for button in page.locator("button.token").all():
        button.click()
    assert page.locator("h1").text_content() == clean(text)
    assert page.locator("img, body script[src], [onmouseover], [onerror]").count() == 0
    watched.check(path.as_uri())


def test_the_report_loads_without_the_network(open_page: Any, tmp_path: Path, neo: Any) -> None:
    ranking = mc.find_memorization_heads(neo, zoo.mixed(neo, n=5), draws=100, progress=False)
    path = ranking.to_html(tmp_path / "report.html", progress=False)
    watched = open_page(path)
    watched.page.wait_for_load_state("load")
    watched.check(path.as_uri())


@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_of_a_ranking(open_page: Any, tmp_path: Path, neo: Any, width: int) -> None:
    """What `memcircuits heads` writes: sorts, follows clicks, fits a phone."""
    ranking = mc.find_memorization_heads(neo, zoo.mixed(neo, n=5), draws=100, progress=False)
    path = ranking.to_html(tmp_path / "report.html", progress=False)
    page = open_page(path, viewport={"width": width, "height": 844}).page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    evidence = page.locator("section", has=page.get_by_role("heading", name="Evidence"))
    heads = evidence.locator("tbody td:first-child")
    best = [str(head) for head in ranking.top(16)]
    assert heads.all_text_contents() == best
    evidence.get_by_role("button", name="score").click()
    evidence.get_by_role("button", name="score").click()
    assert heads.all_text_contents() == best[::-1]

    attention = page.locator("section", has=page.get_by_role("heading", name="Attention of"))
    canvas = drawn(page)
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    attention.get_by_role("button", name=best[1], exact=True).click()
    page.locator(".cv-title", has_text=best[1]).wait_for()
    page.wait_for_function(
        "([canvas, before]) => canvas.toDataURL() !== before", arg=[canvas.element_handle(), before]
    )
    select = attention.locator("select")
    assert select.locator("option").all_text_contents() == [
        "attention of the chosen query",
        "unigram rarity (nats)",
        "log-probability (nats)",
        "tokens lost when replaced (tokens)",
    ]
    select.select_option("2")
    assert attention.locator(".strip.continuation .token.none").count() == 12
    assert attention.locator(".strip.prefix .token.none").count() == 0


def test_tokens_that_differ_are_underlined(open_page: Any, tmp_path: Path) -> None:
    other = make_view(tokens=["a", "x", "c"], title="perturbed")
    view = make_view(tokens=["a", "b", "c"], title="memorized", compare=other)
    view.to_html(tmp_path / "pair.html")
    page = open_page(tmp_path / "pair.html", viewport={"width": 1200, "height": 900}).page
    page.locator(".token.chosen").nth(1).wait_for()
    page.locator("button.token").nth(2).click()
    lines = page.eval_on_selector_all(
        "button.token", "all => all.map(t => getComputedStyle(t).textDecorationLine)"
    )
    assert lines == ["none", "underline", "none"] * 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_block_fits_a_phone(open_page: Any, tmp_path: Path, scheme: str) -> None:
    path = make_page("words of some length", ["a", "b", "c"] * 20).save(tmp_path / "page.html")
    page = open_page(
        path, viewport={"width": 360, "height": 700}, color_scheme=scheme, has_touch=True
    ).page
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator(".heatmap g").nth(1).tap()
    tip = page.locator(".chart .tip").first
    assert "head 1: \u22122" in tip.text_content()


def test_a_long_report_draws_only_what_is_seen(open_page: Any, tmp_path: Path) -> None:
    """What makes a page slow to open is counted: its bytes and the elements that it builds."""
    frame = pd.DataFrame(
        np.random.default_rng(0).normal(size=(10_000, 8)), columns=list("abcdefgh")
    )
    values = frame["a"].to_numpy()[:144].reshape(12, 12)
    line = pd.DataFrame({"x": range(50), "y": frame["b"][:50]})
    view = Attention(make_view(12, 100), title="attention")
    blocks = [Prose(["text"]), Heatmap(values), Table(frame), Lines(line, "x", "y"), view]
    path = Page("report", blocks).save(tmp_path / "report.html")
    assert path.stat().st_size < 3_000_000
    n_elements = open_page(path).page.evaluate("document.querySelectorAll('*').length")
    assert n_elements < 12_000  # the table alone has 90,000 cells


def test_notebook_output_works_in_its_frame(open_page: Any, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    output = make_view(3, 20, title="a view")._repr_html_()
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{output}", encoding="utf-8")
    page = open_page(path, viewport={"width": 1000, "height": 1300}).page
    frame = page.frame_locator("iframe")
    canvas = frame.locator(".cv canvas")
    canvas.scroll_into_view_if_needed()
    canvas.wait_for()
    frame.get_by_role("button", name="L0H1").click()
    frame.locator(".cv h2", has_text="L0H1").wait_for(state="attached")
    assert page.frames[1].evaluate("origin") == "null"  # it shares nothing with the notebook
    with pytest.raises(Exception, match=r"SecurityError|cross-origin|sandboxed"):
        page.frames[1].evaluate("parent.document.title")


def test_the_policy_stops_what_would_slip_through(
    open_page: Any, chromium: Any, tmp_path: Path
) -> None:
    """Were a token to break out after all, the browser would still refuse to run it."""
    html = make_view(2, 8).to_html()
    broken = html.replace(
        "</main>",
        "<script>ran = 1</script><img src=x onerror='ran = 2'><b style='color:red'>x</b></main>",
    )
    path = tmp_path / "broken.html"
    path.write_text(broken, encoding="utf-8")
    context = chromium.new_context(offline=True)
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(path.as_uri())
    drawn(page)
    assert page.evaluate("typeof ran") == "undefined"
    assert (
        page.locator("b", has_text="x").evaluate("b => getComputedStyle(b).color")
        != "rgb(255, 0, 0)"
    )
    assert len([text for text in refused if "Content Security Policy" in text]) >= 3
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "start"), [("pdf", b"%PDF"), ("svg", b"<svg"), ("png", b"\x89PNG")]
)
def test_figures_are_written_as_image_files(
    chromium: Any, tmp_path: Path, ending: str, start: bytes
) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    path = tmp_path / f"figure.{ending}"
    figures.heatmap(np.eye(4), title="Score", units="nats").write_image(path)
    assert path.read_bytes().startswith(start)


def test_a_figure_as_a_page_asks_nothing(open_page: Any, tmp_path: Path) -> None:
    """As the docs say: `write_html(..., include_plotlyjs=True)` works offline, tokens as text."""
    path = tmp_path / "figure.html"
    view = make_view(tokens=[*HOSTILE[:12], "plain"])
    view.figure(0).write_html(path, include_plotlyjs=True)
    page = open_page(path).page
    page.locator(".main-svg").first.wait_for()
    page.mouse.move(300, 300)  # plotly's own hover text
    assert page.locator("img, svg script").count() == 0
