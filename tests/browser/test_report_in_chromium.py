"""The report as its reader uses it: cells open heads, links come back, keys and readers work."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import memcircuits as mc
from memcircuits.display.pages import (
    Bars,
    ComponentDetails,
    Estimate,
    Explorer,
    HeadOnParagraph,
    Heatmap,
    Page,
    ParagraphText,
    Table,
    link,
)
from memcircuits.display.text import MINUS
from tests.display.test_pages import HOSTILE
from tests.helpers import models as zoo

SIZE = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def ranking(neo: Any) -> Any:
    return mc.find_memorization_heads(neo, zoo.mixed(neo, n=5), draws=100, progress=False)


@pytest.fixture(scope="module")
def report(ranking: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranking.to_html(tmp_path_factory.mktemp("report") / "report.html", progress=False)


def many_heads(n_layers: int, n_heads: int, *, tokens: list[str] | None = None) -> Page:
    """A page like a report's, of a model of that size."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n_layers, n_heads, generator=generator)
    names = [[f"L{i}H{j}" for j in range(n_heads)] for i in range(n_layers)]
    order = [names[i // n_heads][i % n_heads] for i in values.flatten().argsort(descending=True)]
    tokens = tokens or [f" w{i}" for i in range(20)]
    n_queries = len(tokens) // 2
    components = {
        name: ComponentDetails(
            {"score": "0.1"},
            [Estimate("as ranked", 0.1, 0.0, 0.2)],
            {"memorized": [0.1, 0.2], "control": [0.0, 0.1]},
            [(tokens[0], 0.5)],
            [HeadOnParagraph(np.zeros((n_queries, 2)), np.full((n_queries, 2), 0.5))],
        )
        for name in order
    }
    frame = pd.DataFrame({"part": [link(name, f"#{name}") for name in order], "score": 0.1})
    losses = {"memorized": [0.1, 0.2], "control": [3.0, 4.0]}
    first = len(tokens) - n_queries - 1
    texts = [ParagraphText("p", tokens)]
    return Page(
        "Many heads",
        [
            Heatmap(values, "score", cell_names=names, title="Every head"),
            Explorer(components, texts, first, losses, "nats/token", title="One part"),
            Bars(frame.assign(part=order).head(5), "part", "score", title="Bars"),
            Table(frame, max_rows=2000, row_ids=order, title="Evidence"),
        ],
        overview="a result",
    )


def test_a_cell_opens_its_head(open_page: Any, report: Path, ranking: Any, neo: Any) -> None:
    page = open_page(report, viewport=SIZE).page
    explorer = page.locator(".explorer")
    assert explorer.locator("select.name").input_value() == str(ranking.top(1)[0])
    page.locator('.heatmap a[href="#L2H1"]').click()
    assert explorer.locator("select.name").input_value() == "L2H1"
    row = ranking.to_frame().query("layer == 2 and head == 1").iloc[0]
    assert f"rank {row['rank']} of 16" in explorer.locator(".rank").text_content()
    assert f"{row['score']:.3f}".replace("-", MINUS) in explorer.locator(".facts-of").text_content()
    assert page.locator("tr.chosen").get_attribute("id") == "L2H1"
    assert page.locator('.heatmap [aria-current="true"]').get_attribute("href") == "#L2H1"
    assert page.url.endswith("#L2H1/0/9")
    # One dot for each paragraph of both sets.
    assert explorer.locator(".effects svg.plot .dot").count() == 10
    # Its attention, on any of the measured paragraphs.
    explorer.locator("select.paragraph").select_option("3")
    view = mc.attention_view(neo, ranking.memorized[3], heads=["L2H1"])
    best = int(view.patterns[0, 9].argmax())
    assert f"(token {best})" in explorer.locator(".looks li").first.text_content()
    assert page.url.endswith("#L2H1/3/9")
    page.go_back()
    page.wait_for_function(
        "() => document.querySelector('.rank').textContent.startsWith('rank 1 ')"
    )


def test_a_mark_of_the_scatter_opens_its_head(open_page: Any, report: Path, ranking: Any) -> None:
    page = open_page(report, viewport=SIZE).page
    section = page.locator("section", has=page.get_by_role("heading", name="Memorized against"))
    assert section.locator("svg a").count() == 16
    head = str(ranking.top(16)[-1])
    section.locator(f'svg a[href="#{head}"]').dispatch_event("click")
    assert page.locator(".explorer select.name").input_value() == head
    assert section.locator('[aria-current="true"]').get_attribute("href") == f"#{head}"


def test_what_has_no_attention_shows_none_and_still_what_it_writes(
    open_page: Any, tmp_path: Path
) -> None:
    tokens = [f" w{i}" for i in range(8)]
    attention = [HeadOnParagraph(np.zeros((4, 2)), np.full((4, 2), 0.5))]
    one, other = Estimate("as ranked", 0.1, 0.0, 0.2), Estimate("mean", 0.2, 0.1, 0.3)
    writes = [(" written", 0.5)]
    components = {
        "L0.mlp": ComponentDetails({}, [one], top_tokens=writes, attends=False),
        "L0H1": ComponentDetails({}, [one, other], top_tokens=writes, on_paragraphs=attention),
    }
    few = "Others were measured for L0H1 alone."
    explorer = Explorer(components, [ParagraphText("p", tokens)], 3, few=few, title="One part")
    page = open_page(Page("Parts", [explorer]).save(tmp_path / "page.html"), viewport=SIZE).page
    attends = page.get_by_role("heading", name="What it attends to")
    assert not attends.is_visible()
    assert not page.locator("canvas.pattern").is_visible()
    assert page.get_by_text(few).is_visible()
    assert "written" in page.locator(".bars-of").text_content()
    page.get_by_role("button", name="Next").click()
    assert attends.is_visible()
    assert page.locator("canvas.pattern").is_visible()
    assert page.get_by_text(few).count() == 0


def test_a_permalink_leads_to_head_paragraph_and_token(open_page: Any, report: Path) -> None:
    watched = open_page(report, viewport=SIZE)
    page = watched.page
    page.goto(f"{report.as_uri()}#L3H0/2/14")
    page.reload()
    explorer = page.locator(".explorer")
    assert explorer.locator("select.name").input_value() == "L3H0"
    assert explorer.locator("select.paragraph").input_value() == "2"
    assert "query token 14 " in explorer.locator(".looks p").text_content()
    assert explorer.bounding_box()["y"] < SIZE["height"]
    page.goto(f"{report.as_uri()}#L3H0/999/-5")  # an address that leads nowhere
    page.reload()
    assert explorer.locator("select.paragraph").input_value() == "4"
    assert "query token 9 " in explorer.locator(".looks p").text_content()
    watched.requests[:] = [report.as_uri()]


def test_cells_and_tokens_are_reached_by_keys(open_page: Any, report: Path) -> None:
    page = open_page(report, viewport=SIZE).page
    cells = page.locator(".heatmap a")
    assert cells.evaluate_all("all => all.filter(a => a.tabIndex === 0).length") == 1
    cells.first.focus()  # the top left: the last layer
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#L2H2"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    explorer = page.locator(".explorer")
    assert explorer.locator("select.name").input_value() == "L3H3"
    explorer.locator(".token.chosen").focus()
    page.keyboard.press("ArrowRight")
    assert "query token 10 " in explorer.locator(".looks p").text_content()
    page.keyboard.press("Home")  # tokens before the first query predict no continuation
    assert "query token 9 " in explorer.locator(".looks p").text_content()
    assert page.evaluate("document.activeElement.classList.contains('chosen')")
    explorer.get_by_role("button", name="Previous").click()
    assert explorer.locator("select.name").input_value() != "L3H3"


def test_the_overview_stays_in_view(open_page: Any, report: Path) -> None:
    page = open_page(report, viewport=SIZE).page
    page.evaluate("scrollTo(0, 3000)")
    nav = page.locator("nav.sticky")
    assert nav.bounding_box()["y"] == 0
    assert "5 of 10 paragraphs recited" in nav.text_content()
    page.locator("nav a", has_text="Evidence").click()
    page.wait_for_function(
        "() => document.querySelector('nav a[aria-current]')?.textContent === 'Evidence'"
    )
    heading = page.get_by_role("heading", name="Evidence")
    assert heading.bounding_box()["y"] >= nav.bounding_box()["height"] - 1


@pytest.mark.parametrize("width", [1200, 390])
def test_a_thousand_heads_stay_smooth(open_page: Any, tmp_path: Path, width: int) -> None:
    """What a click changes does not grow with the number of heads, nor do elements explode."""
    changes = {}
    for n_layers in (4, 32):
        path = many_heads(n_layers, 32).save(tmp_path / f"{n_layers}.html")
        page = open_page(path, viewport={"width": width, "height": 800}).page
        n_heads = 32 * n_layers
        assert page.evaluate("document.querySelectorAll('*').length") < 10 * n_heads + 1500
        page.evaluate("""() => {
            window.changed = 0;
            new MutationObserver((all) => { window.changed += all.length; }).observe(document.body,
                { subtree: true, childList: true, attributes: true, characterData: true });
        }""")
        page.locator(f'.heatmap a[href="#L{n_layers - 1}H7"]').click()
        page.locator("select.name").evaluate("select => select.value")
        changes[n_layers] = page.evaluate("window.changed")
        assert page.locator("tbody tr:visible").count() == 25
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert 0 < changes[32] <= changes[4] + 20


def test_hostile_tokens_in_the_explorer_are_text(open_page: Any, tmp_path: Path) -> None:
    page = open_page(many_heads(2, 6, tokens=HOSTILE).save(tmp_path / "page.html")).page
    explorer = page.locator(".explorer")
    assert explorer.locator("button.token").count() == len(HOSTILE)
    page.locator('.heatmap a[href="#L1H2"]').click()
    assert explorer.locator("img, script[src], [onmouseover], b:not(.ramp b)").count() == 0


def test_without_scripts_links_lead_to_rows(open_page: Any, report: Path, ranking: Any) -> None:
    page = open_page(report, java_script_enabled=False, viewport=SIZE).page
    assert page.locator(".needs-script:visible").count() == 0
    assert page.locator(".tools:visible, .pager:visible").count() == 0
    assert page.locator("tbody tr[id]").count() == page.locator("tbody tr[id]:visible").count()
    for head in ranking.top(16):
        assert page.locator(f"tr#{head}").count() == 1
        assert page.locator(f'.heatmap a[href="#{head}"]').count() == 1


def test_printed_pages_are_whole_and_light(open_page: Any, report: Path) -> None:
    page = open_page(report, color_scheme="dark", viewport={"width": 720, "height": 900}).page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    wide = """() => [...document.querySelectorAll('table')]
        .filter((table) => table.getBoundingClientRect().right > innerWidth + 1).length"""
    assert page.evaluate(wide) == 0
    assert page.locator(".tools:visible, .save:visible, nav ul:visible").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    rows = page.locator("tr[id]")
    assert rows.count() == page.locator("tr[id]:visible").count() == 16


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(open_page: Any, report: Path, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed")
    page = open_page(
        report, viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=True
    ).page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # what is drawn when seen, too
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")
    serious = {
        rule["id"]: [node["html"][:120] for node in rule["nodes"][:3]]
        for rule in found["violations"]
        if rule["impact"] in {"serious", "critical"}
    }
    assert serious == {}
    assert len(found["passes"]) > 15


def test_a_chosen_head_survives_packing() -> None:
    """Keys above 255 take two bytes."""
    keys, weights = np.array([[300, 2]]), np.array([[1.0, 0.004]])
    packed = HeadOnParagraph(keys, weights).packed(400)
    raw = base64.b64decode(packed["attention"])
    assert np.frombuffer(raw[:4], "<u2").tolist() == [300, 2]
    assert list(raw[4:]) == [250, 1]
