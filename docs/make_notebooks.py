"""Execute notebooks and store what they show: python docs/make_notebooks.py [NAME ...].

A notebook is made from the text beside it (examples/NAME.py) and run from top to bottom; without a
name, all are. Figures are stored as data, which JupyterLab and VS Code draw, and as a picture,
which GitHub and Colab show; attention views are frames that hold all they need, with a picture
beside. No output needs another one, and progress bars are left out. Needs the extra `dev` and
Chromium; each notebook takes some minutes.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
import plotly.io
from make_screenshots import drawn, opened
from playwright.sync_api import Browser, sync_playwright
from site_hooks import PLOTLY, VIEW

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = tuple(path.stem for path in sorted(EXAMPLES.glob("*.ipynb")))


def executed(name: str, folder: Path) -> Any:
    """The notebook run in a folder of its own, its figures stored as data."""
    notebook = jupytext.read(EXAMPLES / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # the same each time
    client = nbclient.NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    settings = {"PLOTLY_RENDERER": "plotly_mimetype", "PYTHONWARNINGS": "ignore:IProgress"}
    client.execute(env={**os.environ, **settings})
    return notebook


def without_bars(outputs: list[Any]) -> list[Any]:
    """The outputs but for progress bars, which rewrite their line."""
    return [
        output
        for output in outputs
        if not (output["output_type"] == "stream" and "\r" in output["text"])
    ]


def picture(browser: Browser, data: dict[str, Any], folder: Path) -> bytes | None:
    """What a figure or an attention view looks like; None for other outputs."""
    page_file = folder / "output.html"
    if PLOTLY in data:
        figure = plotly.io.from_json(json.dumps(data[PLOTLY]), skip_invalid=True)
        figure.write_html(page_file, include_plotlyjs=True)
        width, height = int(figure.layout.width), int(figure.layout.height)
        page = opened(browser, page_file, width + 20, height + 20)
        page.wait_for_selector(".main-svg")
        shot = page.locator(".svg-container").screenshot()
    elif view := VIEW.search(data.get("text/html", "")):
        page_file.write_text(html.unescape(view[1]), encoding="utf-8")
        page = opened(browser, page_file, 1000, 900)
        drawn(page)
        shot = page.locator("section").first.screenshot()
    else:
        return None
    page.context.close()
    return shot


def main() -> None:
    """Execute and write the notebooks that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no notebook {unknown[0]}: choose from {', '.join(NAMES)}")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as temporary:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in names:
            notebook = executed(name, Path(temporary))
            for cell in notebook.cells:
                if cell.cell_type != "code":
                    continue
                cell.outputs = without_bars(cell.outputs)
                for output in cell.outputs:
                    shot = picture(browser, output.get("data", {}), Path(temporary))
                    if shot is not None:
                        output["data"]["image/png"] = base64.b64encode(shot).decode()
            path = EXAMPLES / f"{name}.ipynb"
            nbformat.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
