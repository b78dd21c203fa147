"""Hooks of MkDocs: the notebooks of examples/ become pages of the site, as they were executed.

The schema of what commands print as JSON becomes a file of the site.

Every notebook is written as Markdown: its cells, and what each cell showed. Pictures and attention
views become files beside the page, so that the page itself stays small.
"""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

SCHEMA = Path(__file__).parents[1] / "memcircuits" / "commands" / "output.schema.json"
EXAMPLES = Path(__file__).parents[1] / "examples"
VIEW = re.compile(r'<iframe[^>]*srcdoc="([^"]*)"')
PLOTLY = "application/vnd.plotly.v1+json"
NOTEBOOK_LINK = re.compile(r"\]\(((?:\.\./)*)\.\./examples/(\w+)\.ipynb\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, the files that it shows, and the schema of commands."""
    schema = SCHEMA.read_text("utf-8")
    files.append(
        File.generated(
            config, "command.schema.json", content=schema, inclusion=InclusionLevel.INCLUDED
        )
    )
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        for name, content in notebook_files(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to notebooks, which work in the repository, to their pages."""
    return NOTEBOOK_LINK.sub(r"](\1notebooks/\2.md)", markdown)


def notebook_files(path: Path) -> dict[str, str | bytes]:
    """The page of a notebook as Markdown, and its pictures and views: name -> content."""
    notebook = json.loads(path.read_text("utf-8"))
    extra: dict[str, str | bytes] = {}
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
            continue
        parts.append(_fenced(source, "python"))
        parts += [_output(output, path.stem, extra) for output in cell["outputs"]]
    return {f"{path.stem}.md": "\n\n".join(parts) + "\n", **extra}


def _output(output: dict[str, Any], stem: str, extra: dict[str, str | bytes]) -> str:
    """One output as Markdown; a picture or view is added to `extra`, numbered."""
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]).rstrip(), "text")
    data, name = output["data"], f"{stem}-{len(extra) + 1}"
    markup = "".join(data.get("text/html", ""))
    if view := VIEW.search(markup):
        extra[f"{name}.html"] = html.unescape(view[1])
        return (
            f'<iframe class="view" src="../{name}.html" title="Attention view" loading="lazy">'
            "</iframe>"
        )
    if "image/png" in data:
        extra[f"{name}.png"] = base64.b64decode("".join(data["image/png"]))
        return f"![{_title(data)}]({name}.png)"
    if markup:
        return f'<div class="output">\n{markup}\n</div>'
    return _fenced("".join(data["text/plain"]), "text")


def _title(data: dict[str, Any]) -> str:
    """The title of a plotly figure, for those who do not see it."""
    layout = data.get(PLOTLY, {}).get("layout", {})
    title = re.sub(r"<[^>]+>", " ", layout.get("title", {}).get("text", "Figure"))
    return title.replace("[", "(").replace("]", ")")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
