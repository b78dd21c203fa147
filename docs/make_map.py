"""Write docs/map.md, docs/map.json and its pictures: python docs/make_map.py MODEL.gguf

Maps two public-domain texts with a pretrained model: the Declaration of Independence, which is on
very many pages of the web, and a stretch of the Jargon File of the same length, which is on few.
The page of the first is opened in Chromium with the network cut off, on a wide and on a narrow
screen. MODEL is the GGUF file that tests/models/test_gemma3.py puts together out of its packages,
or another model. The texts come from Debian packages (`memcircuits.organism_build.corpus`), so
apt-get and dpkg-deb are needed, and the extras `gguf` and `dev`. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import memcircuits as mc
from memcircuits.base.io import write_atomically
from memcircuits.measure.document.document_map import DocumentMap
from memcircuits.organism_build.corpus import SOURCES, unpack

DOCS = Path(__file__).parent
LENGTH = 20  # tokens of prefix and of continuation
SCREENS = {"map": (1280, 860, "light"), "map-phone": (390, 800, "dark")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="GGUF file, folder or name on the hub")
    parser.add_argument("--work", type=Path, default=Path("map-work"), help="folder of downloads")
    given = parser.parse_args()
    given.work.mkdir(exist_ok=True)
    model = mc.load_model(given.model)
    declaration = source_text("founding", given.work)
    declaration = declaration[declaration.index("When in the Course") :]
    jargon = source_text("jargon", given.work)
    start = jargon.index("\n", len(jargon) // 2) + 1
    texts = {
        "Declaration of Independence": declaration,
        "Jargon File": jargon[start : start + len(declaration)],
    }
    rows, maps = [], {}
    for title, text in texts.items():
        began = time.process_time()
        folder = given.work / f"{title}.scan"
        maps[title] = mc.document_map(
            model, text, n_prefix=LENGTH, n_continuation=LENGTH, folder=folder
        )
        rows.append(row(title, text, maps[title], time.process_time() - began))
    page = maps["Declaration of Independence"].to_html(given.work / "map.html")
    pictures(page)
    measured = {"model": Path(given.model).name, "rows": rows, "bytes": page.stat().st_size}
    write_atomically(DOCS / "map.json", json.dumps(measured, indent=1) + "\n")
    write_atomically(DOCS / "map.md", page_text(measured))


def source_text(name: str, work: Path) -> str:
    """The clean text of one source; of several documents, the last."""
    (source,) = (source for source in SOURCES if source.name == name)
    return source.clean(source.read(unpack(source, work)))[-1]


def row(title: str, text: str, mapped: DocumentMap, seconds: float) -> dict[str, Any]:
    """What a map says, in numbers."""
    frame = mapped.to_frame()
    longest = max(mapped.spans, key=lambda span: span.n_tokens, default=None)
    return {
        "title": title,
        "characters": len(text),
        "windows": len(frame),
        "recited": int(mapped.is_memorized.sum()),
        "mean_em": round(float(frame["em"].mean()), 2),
        "mean_nll": round(float(frame["nll"].mean()), 3),
        "spans": len(mapped.spans),
        "longest": 0 if longest is None else longest.n_tokens,
        "seconds": round(seconds),
    }


def pictures(page: Path) -> None:
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height, scheme) in SCREENS.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
            )
            tab = context.new_page()
            tab.goto(page.resolve().as_uri())
            tab.wait_for_load_state("load")
            tab.screenshot(path=DOCS / "images" / f"{name}.png")
        browser.close()


def page_text(measured: dict[str, Any]) -> str:
    introduction = (
        f"Which parts of a text does `{measured['model']}` recite? Every window of "
        f"{LENGTH} + {LENGTH} tokens that begins at a multiple of ten tokens was scored, behind "
        "the tokens that the model's tokenizer puts in front. One text is on very many pages of "
        "the web, the other on few; what this model was trained on is not known. Written by "
        "`python docs/make_map.py`."
    )
    pictures = (
        f"The page of the first text ({measured['bytes'] / 1e6:.2f} MB, `memcircuits map FILE`), "
        "wide and light, narrow and dark:"
    )
    rows = ["| " + " | ".join(map(str, row.values())) + " |" for row in measured["rows"]]
    return "\n".join(
        [
            "# A map of a document\n",
            textwrap.fill(introduction, 100) + "\n",
            "| text | characters | windows | recited in full | mean EM | mean NLL, nats/token "
            "| recited passages | longest, tokens | seconds of one core |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "\n" + textwrap.fill(pictures, 100) + "\n",
            "![The Declaration of Independence with recited stretches marked](images/map.png)\n",
            "![The same on a phone](images/map-phone.png)\n",
        ]
    )


if __name__ == "__main__":
    main()
