"""Results in notebooks: executed by a kernel, exported to HTML, opened with the network cut off.

Only plotly's own output (MathJax, which it can do without) and nothing of ours asks the network.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import ROOT

EXAMPLE = ROOT / "examples" / "quickstart"
PLOTLY_ASKS = "https://cdnjs.cloudflare.com/ajax/libs/mathjax/"

SETUP = """
import sys
sys.path.insert(0, {root!r})
from tests.helpers import models as zoo
import memcircuits as mc
from memcircuits.editing.evaluation import evaluate_edit
from memcircuits.editing.relearning import recovery_curve
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.editing.noise import weight_noise
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.editing.recipe import Recipe

model = zoo.bridge("gpt_neo")
every = zoo.mixed(model, n=6)
memorized, control = every[list(range(6))], every[list(range(6, 12))]
"""
# Each ends with a result; the words are in what it shows.
CELLS = {
    "mc.scan(model, every)": "12 paragraphs, 6 memorized",
    "ranking = mc.find_memorization_heads(model, every, draws=50)\nranking": "significant",
    "ranking.scores": "memorization score",
    "mc.ablate_heads(model, memorized)": "zero ablation",
    "mc.parameter_gradients(model, memorized)": "lower-half share",
    "mc.activation_gradients(model, memorized)": "activation gradients",
    "mc.rare_token_attention(model, every)": "tau-b",
    "perturbed = mc.perturb_prefix(model, memorized, draws=2)\nperturbed": "mean EM drop",
    "pairs = perturbed.pairs()\n"
    "mc.patch_heads(model, pairs.clean, pairs.corrupted)": "4 layers x 4",
    "patch_layers(model, pairs.clean, pairs.corrupted)": "positions",
    "minimal_sets(model, memorized)": "stopped",
    "change = mc.unlearn(model, memorized[:2], control, fraction=0.01, recipe=Recipe(steps=2))\n"
    "change": "weights changed",
    "evaluate_edit(model, change, memorized[:2], control, attacks=2)": "memorized EM",
    "recovery_curve(model, change, memorized[:2], memorized[2:], steps=2)": "after 2 steps",
    "weight_noise(model, memorized, control, sizes=(0, 0.1), draws=1)": "noise on",
    "ranking.attention(pairs.clean[0], compare=pairs.corrupted[0])": "iframe",
    "ranking.figure()": "svg",
}


def executed(notebook: Any, folder: Path) -> str:
    """The notebook run from top to bottom, as the HTML that `jupyter nbconvert` makes of it."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    exporting = pytest.importorskip("nbconvert", reason="nbconvert is not installed")
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    # Figures are drawn by a script of their own, which the exported page holds.
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "PLOTLY_RENDERER": "notebook"})
    # The export's own page would ask for scripts that none of our results needs.
    exporter = exporting.HTMLExporter(
        require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url=""
    )
    return exporter.from_notebook_node(notebook)[0]


def opened(chromium: Any, path: Path) -> tuple[Any, list[str], list[str]]:
    """The page, what it asked for and what went wrong, but for plotly's MathJax."""
    page = chromium.new_context(offline=True, viewport={"width": 1200, "height": 900}).new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_timeout(2000)
    return page, [url for url in asked if not url.startswith(PLOTLY_ASKS)], errors


def check_views(page: Any) -> None:
    """Attention views are frames of their own, drawn, and follow clicks."""
    place = page.locator("iframe[sandbox^='allow-scripts'][srcdoc]")
    assert place.count() == 1
    place.scroll_into_view_if_needed()
    frame = place.content_frame
    canvas = frame.locator(".cv canvas").first
    canvas.scroll_into_view_if_needed()
    canvas.wait_for()
    name = frame.locator(".thumbs button span").nth(1).text_content()
    frame.get_by_role("button", name=name).first.click()
    assert f"Under {name}" in frame.locator(".looks").first.text_content()
    assert f"Under {name}" in frame.locator(".looks").nth(1).text_content()  # it follows


def check_opening(chromium: Any, html: str, path: Path, figures: int) -> None:
    path.write_text(html, encoding="utf-8")
    page, asked, errors = opened(chromium, path)
    assert asked == [path.as_uri(), "about:srcdoc"] or asked == [path.as_uri()]
    # What plotly asks for and does not get is the only complaint.
    assert [text for text in errors if "ERR_INTERNET_DISCONNECTED" not in text] == []
    assert page.locator(".js-plotly-plot").count() == figures
    assert page.locator(".js-plotly-plot .main-svg").count() >= figures
    check_views(page)
    page.context.close()


@pytest.mark.slow
def test_every_result_as_the_last_line(chromium: Any, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")

    sources = [SETUP.format(root=str(ROOT)), *CELLS]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    html = executed(notebook, tmp_path)
    for cell, words in zip(notebook.cells[1:], CELLS.values(), strict=True):
        shown = [output for output in cell.outputs if output.output_type != "stream"]
        assert "text/html" in shown[-1].data, cell.source
        assert words in shown[-1].data["text/html"], cell.source
        assert not any("Warning" in str(o.get("text", "")) for o in cell.outputs), cell.source
    check_opening(chromium, html, tmp_path / "results.html", figures=1)


@pytest.mark.slow
def test_the_example_notebook(chromium: Any, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(EXAMPLE.with_suffix(".ipynb"), as_version=4)
    html = executed(notebook, tmp_path)
    assert (tmp_path / "quickstart.html").stat().st_size > 1_000_000
    figures = sum(".figure(" in cell.source for cell in notebook.cells)
    assert figures == 4
    check_opening(chromium, html, tmp_path / "notebook.html", figures)


STORED = [
    path
    for path in sorted((ROOT / "examples").glob("*.ipynb"))
    if any(cell.get("outputs") for cell in json.loads(path.read_text("utf-8"))["cells"])
]
PLOTLY = "application/vnd.plotly.v1+json"


def stored_outputs(path: Path) -> list[dict[str, Any]]:
    """What the cells of a committed notebook show: figures, views and tables."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output["data"] for output in outputs if "data" in output]


def joined(text: str | list[str]) -> str:
    return "".join(text)


def test_some_notebook_is_stored_executed() -> None:
    assert STORED, "python docs/make_notebooks.py"


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_notebook_is_executed_whole(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    streams = [o for cell in code for o in cell["outputs"] if o["output_type"] == "stream"]
    assert not any("\r" in joined(stream["text"]) for stream in streams), "a progress bar"
    assert not any("site-packages" in joined(stream["text"]) for stream in streams), "a warning"
    assert not any(o["output_type"] == "error" for cell in code for o in cell["outputs"])
    figures = sum(".figure(" in joined(cell["source"]) for cell in code)
    assert sum(PLOTLY in data for data in stored_outputs(path)) == figures
    assert all(len(joined(data.get("text/plain", ""))) < 3000 for data in stored_outputs(path))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_each_stored_output_shows_in_a_document_of_its_own(
    chromium: Any, tmp_path: Path, path: Path
) -> None:
    """As Colab shows it, one frame for each output, and GitHub, which shows the picture."""
    import plotly.io

    for number, data in enumerate(stored_outputs(path)):
        markup = joined(data.get("text/html", ""))
        if PLOTLY in data or "<iframe" in markup:
            picture = base64.b64decode(joined(data["image/png"]))
            assert Image.open(io.BytesIO(picture)).size[0] > 300
        if PLOTLY in data:  # drawn by the script of the front end, here plotly's own
            assert markup == "", "a figure that needs the script of another output"
            figure = plotly.io.from_json(json.dumps(data[PLOTLY]), skip_invalid=True)
            assert figure.data
        elif markup:
            page_file = tmp_path / f"{number}.html"
            page_file.write_text(f"<!doctype html><meta charset=utf-8>{markup}", "utf-8")
            page, asked, errors = opened(chromium, page_file)
            assert set(asked) <= {page_file.as_uri(), "about:srcdoc"}
            assert errors == []
            if "<iframe" in markup:
                page.locator("iframe").scroll_into_view_if_needed()
                place = page.locator("iframe").content_frame.locator(".cv").first
                place.scroll_into_view_if_needed()  # a view is drawn when it is scrolled to
                place.locator("canvas").wait_for()
            else:
                assert page.locator("table").count() >= 1
            page.context.close()


def test_the_example_is_one_notebook_in_two_formats() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    text, notebook = (jupytext.read(EXAMPLE.with_suffix(s)) for s in (".py", ".ipynb"))

    def cells(notebook: Any) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    remedy = "run: python docs/make_notebooks.py quickstart"
    assert cells(text) == cells(notebook), remedy
