"""The documentation as it is built: pages, fences, pictures, navigation, notebooks."""

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.helpers import ROOT

GROUPS = ["Start", "Guides", "Results", "Reference", "Project"]


class Page(HTMLParser):
    """Text outside of code, pictures and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.prose, self.images, self.links, self._inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in {"code", "pre", "script", "style"}:
            self._inside.append(tag)
        elif tag == "img":
            self.images.append(attrs)
        elif tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.prose.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: the one that `SITE` names, or else built here."""
    if "SITE" in os.environ:
        return Path(os.environ["SITE"])
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)]
    environment = {**os.environ, "MEMCIRCUITS_REPOSITORY": "https://example.org/some/repository"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def plain(markup):
    """The text of a heading, without the link to itself."""
    text = html.unescape(re.sub(r"<[^>]+>", "", markup))
    return " ".join(text.replace("¶", "").split())


def pages(site):
    return {
        path.parent.relative_to(site).as_posix(): path.read_text("utf-8")
        for path in sorted(site.rglob("index.html"))
    }


@pytest.mark.slow
def test_no_page_shows_its_markdown(site):
    broken = {}
    for name, text in pages(site).items():
        prose = "".join(Page(text).prose)
        for sign in ("```", "notest", ":::", "](", "**", "--8<--"):
            if sign in prose:
                broken[name] = sign, prose[max(0, prose.index(sign) - 40) :][:100]
    assert broken == {}


@pytest.mark.slow
def test_every_heading_of_a_page_is_in_the_page(site):
    """A broken fence swallows what follows it, headings too."""
    built = pages(site)
    for source in sorted((ROOT / "docs").rglob("*.md")):
        name = source.relative_to(ROOT / "docs").with_suffix("").as_posix()
        text = source.read_text("utf-8")
        text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)
        text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
        page = built["." if name == "index" else name.removesuffix("/index")]
        headings = {plain(h) for h in re.findall(r"<h\d[^>]*>(.*?)</h\d>", page, flags=re.S)}
        for heading in re.findall(r"^##+ (.*)$", text, flags=re.M):
            written = re.sub(r"`|\*\*|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip()
            assert written in headings, f"{name}: {heading}"


@pytest.mark.slow
def test_every_page_has_the_navigation_and_the_switch(site):
    for name, text in pages(site).items():
        tabs = re.findall(r'class="md-tabs__link"[^>]*>\s*([^<]*?)\s*<', text)
        assert tabs == GROUPS, name
        assert text.count('name="__palette"') == 3, name  # by the system, light, dark
    names = set(pages(site))
    assert {"recipes", "for/privacy", "for/publishers", "reference", "reference/heads"} <= names
    assert [*site.rglob("make_*"), *site.rglob("*_page")] == []


@pytest.mark.slow
def test_pictures_exist_and_are_described(site):
    for name, text in pages(site).items():
        for image in Page(text).images:
            assert image.get("alt"), f"{name}: {image['src']}"
            assert (site / name / image["src"]).is_file(), f"{name}: {image['src']}"
    assert len(Page(pages(site)["."]).images) >= 3  # the home page shows what one gets


@pytest.mark.slow
def test_notebooks_are_pages_with_their_outputs(site):
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        text = pages(site)[f"notebooks/{path.stem}"]
        outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        shown = len(Page(text).images) + text.count('<iframe class="view"')
        assert shown == len(pictures)
        for name in re.findall(r'<iframe class="view" src="([^"]+)"', text):
            assert (site / "notebooks" / path.stem / name).is_file()


@pytest.mark.slow
def test_the_command_line_page_cuts_no_sentence(site):
    lines = re.findall(r"<li>(.*?)</li>", pages(site)["cli"], flags=re.S)
    assert len(lines) > 100
    assert [line for line in lines if re.search(r"\.\.\.\s*$", line)] == []


def test_a_notebook_becomes_markdown(monkeypatch, tmp_path):
    hooks = site_hooks()
    cells = [
        {"cell_type": "markdown", "source": ["See [why](../docs/evidence.md)."]},
        {
            "cell_type": "code",
            "source": ["scan"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["12 paragraphs\n"]},
                {"output_type": "display_data", "data": {"image/png": "AAAA"}},
                {"output_type": "display_data", "data": {"text/html": ["<table></table>"]}},
                {
                    "output_type": "execute_result",
                    "data": {
                        "text/html": ['<iframe srcdoc="&lt;p&gt;a view"></iframe>'],
                        "image/png": "AAAA",
                    },
                },
            ],
        },
    ]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells}), "utf-8")
    files = hooks.notebook_files(path)
    assert set(files) == {"book.md", "book-1.png", "book-2.html"}
    assert files["book-1.png"] == bytes(3)
    assert files["book-2.html"] == "<p>a view"
    page = files["book.md"]
    assert "(../evidence.md)" in page
    assert "```text\n12 paragraphs\n```" in page
    assert page.index("](book-1.png)") < page.index("<table>") < page.index("../book-2.html")


def test_links_to_notebooks_lead_to_their_pages():
    hooks = site_hooks()
    one = hooks.on_page_markdown("[a](../examples/quickstart.ipynb)")
    two = hooks.on_page_markdown("[a](../../examples/quickstart.ipynb)")
    assert (one, two) == ("[a](notebooks/quickstart.md)", "[a](../notebooks/quickstart.md)")


def site_hooks():
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks
