"""docs/matrix.md: what a reader asks first stands first, the full tables of each version below."""

from __future__ import annotations

import re
from pathlib import Path

INTRODUCTION = """# Supported models

Which models can be analysed, and how far each analysis is from plain transformers with PyTorch
hooks and autograd written by hand. All models here are tiny and random: the architecture is what is
tried. Written by `python -m tests.matrix`, once for each version of transformer-lens.

`memcircuits info MODEL` loads a model of yours and checks that its sites, gradients and batches are
what the analyses take them for.
"""

LARGEST = """## The largest difference from plain PyTorch

Over both versions of transformer-lens, `TransformerBridge` and `HookedTransformer`, raw and folded
weights: nats per token or probability; for gradients, relative to the largest. Exact matches are
equal to those of `generate`. A number marked c is a difference between the two classes, where there
is nothing in plain PyTorch to compare with.
"""

IN_FULL = """## In full

Where folding gives weights another meaning, the number is the difference from the other class in
the same basis (marked c), and `ran` where there is no other class.
"""

Table = list[list[str]]


def page(sections: dict[str, str]) -> str:
    """The page, from one section for each version of transformer-lens: version -> text."""
    ordered = [sections[key] for key in sorted(sections, reverse=True)]
    newest = ordered[0]
    loaded = re.search(r"^Also loaded.*$", newest, flags=re.MULTILINE)
    architectures = list(dict.fromkeys(row[0] for row in numbers(newest)[1:]))
    models = [
        "## What loads, and what is refused",
        "",
        f"Compared with plain PyTorch in every analysis: {', '.join(architectures)}.",
        "",
        loaded.group() if loaded else "",
        "",
        newest[newest.index("| refused at load") :].strip(),
        "",
    ]
    largest = [LARGEST, *markdown(summary([numbers(text) for text in ordered])), ""]
    return "\n".join([INTRODUCTION, *models, *largest, IN_FULL, *ordered])


def numbers(section: str) -> Table:
    """The table of analyses in a version's section: a row of titles, then one for each variant."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    first = next(i for i, line in enumerate(lines) if line.startswith("| architecture |"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    return [row for row in cells if len(row) == len(cells[0]) and set(row[0]) != {"-"}]


def summary(tables: list[Table]) -> Table:
    """Analyses x architectures: the largest number of any table and variant, or what was said."""
    found: dict[str, dict[str, list[str]]] = {}
    for titles, *rows in tables:
        for architecture, _, *cells in rows:
            for analysis, cell in zip(titles[2:], cells, strict=True):
                found.setdefault(analysis, {}).setdefault(architecture, []).append(cell)
    architectures = list(dict.fromkeys(name for line in found.values() for name in line))
    rows = [
        [analysis, *(largest(line.get(name, [])) for name in architectures)]
        for analysis, line in found.items()
    ]
    return [["analysis", *architectures], *rows]


def largest(cells: list[str]) -> str:
    """The largest number without a mark, else the largest with one, else what the cells say."""
    plain = [cell for cell in cells if cell[:1].isdigit() and not cell.endswith(" c")]
    marked = [cell for cell in cells if cell.endswith(" c")]
    numbered = plain or marked
    return max(numbered, key=lambda cell: float(cell.split()[0])) if numbered else cells[0]


def markdown(table: Table) -> list[str]:
    titles, *rows = ["| " + " | ".join(row) + " |" for row in table]
    return [titles, "|" + " --- |" * len(table[0]), *rows]


def write(path: Path, version: str, section: str) -> None:
    """Replace the section of one version, keep those of the others."""
    sections: dict[str, str] = {}
    if path.is_file():
        for part in path.read_text(encoding="utf-8").split("\n## transformer-lens ")[1:]:
            sections[part.splitlines()[0]] = f"## transformer-lens {part.strip()}\n"
    sections[version] = section
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(sections), encoding="utf-8")
