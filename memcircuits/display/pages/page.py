"""A page: one HTML file that holds everything it shows and asks nothing of any network.

    page = Page("What this model recites", [Numbers(...), Heatmap(...), Table(...)])
    page.save("report.html")

The templates (`templates/`) hold all markup and escape everything that they print; one stylesheet
and one script (`static/page/`, joined) serve every block; long texts, passages and graphs have
a script of their own.
CircuitsVis' script, 1.3 MB, is inlined once, and only if the page shows attention. The
content-security-policy in the head admits these scripts and this stylesheet by their hashes and
nothing else: no other script, no `style=` attribute, no request, no form, no frame, and no text
assigned as HTML (trusted types), not even by those scripts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from memcircuits.base.io import write_atomically
from memcircuits.display import palette
from memcircuits.display.pages.blocks import Block
from memcircuits.display.text import clean, csp_hash, json_block

_FOLDER = Path(__file__).parent

_PARTS = ("helpers", "overview", "tables", "charts", "attention", "explorer_charts", "explorer")
"""The parts of the page's script, in the order in which they run."""

_STYLES = (
    "base",
    "charts",
    "edge_graph",
    "tokens",
    "passages",
    "document",
    "explorer",
    "narrow",
    "print",
)
"""The parts of its stylesheet; later ones overrule earlier ones."""

# The field says query and key where CircuitsVis says destination and source.
_AXES = {
    '"Source Token"': '"key"',
    '"Destination Token"': '"query"',
    "`Src: ${": "`key: ${",
    "`Dest: ${": "`query: ${",
}


def _clean_unless_markup(value: Any) -> Any:
    """Last step before autoescape: everything that a template prints, except markup, is cleaned."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        finalize=_clean_unless_markup,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json_block"] = json_block
    return environment


@cache
def stylesheet() -> str:
    """The page's stylesheet: its parts in `static/page/`, with the colour classes filled in."""
    folder = _FOLDER / "static" / "page"
    source = "".join((folder / f"{part}.css").read_text(encoding="utf-8") for part in _STYLES)
    return source.replace("/* light */", palette.classes("light")).replace(
        "/* dark */", palette.classes("dark")
    )


@cache
def script(name: str = "page") -> str:
    """A script of our own: the one of every page, or the one of a block.

    The first one is kept in parts, which share what `helpers.js` defines and nothing else.
    """
    if name != "page":
        return (_FOLDER / "static" / f"{name}.js").read_text(encoding="utf-8")
    parts = [(_FOLDER / "static" / "page" / f"{part}.js") for part in _PARTS]
    return "".join(["(() => {\n", *(part.read_text(encoding="utf-8") for part in parts), "})();\n"])


@cache
def circuitsvis_bundle() -> str:
    r"""CircuitsVis' script from the installed package, with its licence, ready to be inlined.

    The package is not imported. A script element ends at the first `</script`, even inside a
    string, so the one in React's code is written `<\/script`, which means the same.

    Raises:
        RuntimeError: if the package is not installed, or its bundle is not where 1.43 has it.
    """
    spec = importlib.util.find_spec("circuitsvis")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / "dist" / "cdn" / "iife.js" if folders else None
    if path is None or not path.is_file():
        raise RuntimeError(
            f"CircuitsVis' script is not at {path}: install circuitsvis>=1.43.3 to show attention"
        )
    source = path.read_text(encoding="utf-8")
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE)
    source = re.sub(r"<(?=/script|!--)", r"<\\", source, flags=re.IGNORECASE)
    for name, field_name in _AXES.items():
        source = source.replace(name, field_name)
    version = importlib.metadata.version("circuitsvis")
    licence = (_FOLDER / "static" / "circuitsvis-LICENSE.txt").read_text(encoding="utf-8")
    changes = "unchanged but for escaping and the names of its axes"
    return f"/*! CircuitsVis {version}, {changes}.\n\n{licence}*/\n{source}"


@dataclass(frozen=True)
class Page:
    """A title, a lead and blocks, rendered as one file.

    Attributes:
        title: heading and browser title.
        blocks: shown in this order; those with a title appear in the table of contents.
        lead: one or two sentences that tell a newcomer what this is.
        footer: small print.
        overview: the result in a few words; it stays at the top, with the table of contents, while
            the reader scrolls.
    """

    title: str
    blocks: Sequence[Block]
    lead: str = ""
    footer: str = ""
    overview: str = ""

    def render(self) -> str:
        """The whole page as a string; the same blocks give the same bytes."""
        style, scripts = stylesheet(), [script()]
        needed = {name for block in self.blocks for name in block.scripts}
        if "circuitsvis" in needed:
            scripts.insert(0, circuitsvis_bundle())
        scripts += [script(name) for name in sorted(needed - {"circuitsvis"})]
        template = _environment().get_template("page.html.j2")
        return template.render(
            page=self,
            blocks=[_variables(block) for block in self.blocks],
            policy=Markup(security_policy(scripts, style)),
            style=Markup(style),
            scripts=[Markup(s) for s in scripts],
        )

    def save(self, path: str | Path) -> Path:
        """Write the page; an older file there is replaced in one step or not at all."""
        return write_atomically(path, self.render())

    def _repr_html_(self) -> str:
        """The page in a sandboxed frame, for notebooks."""
        return frame(self.render(), title=self.title, height=900)


def _variables(block: Block) -> dict[str, Any]:
    """What the template of a block sees: its fields, then what `Block.context` computes."""
    values = {field.name: getattr(block, field.name) for field in fields(block)}
    return {**values, "template": block.template, **block.context()}


def security_policy(scripts: Sequence[str], style: str) -> str:
    """The content-security-policy that admits exactly these scripts and this stylesheet."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(csp_hash(source) for source in scripts)}",
            f"style-src {csp_hash(style)}",
            "img-src data:",
            "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def frame(page: str, *, title: str, height: int) -> str:
    """A page inside a sandboxed frame, as notebooks show it (Lab, classic, VS Code and Colab).

    The frame holds the whole page, so that a saved notebook shows it offline. It may run the page's
    scripts but shares nothing with the notebook. A front end that removes frames from notebooks
    that it does not trust shows the sentence inside instead.
    """
    markup = Markup(
        '<iframe sandbox="allow-scripts allow-downloads" title="{}" width="100%" height="{}" '
        'style="border:0;background:#fff" srcdoc="{}">'
        "Trust this notebook to see this view, or save it as a page with .to_html(path)."
        "</iframe>"
    )
    return str(markup.format(clean(title), height, page))  # escapes what it fills in
