"""Every public analysis on every architecture, model class and basis, against plain PyTorch.

`ANALYSES` is the table: to add an analysis, add a line. `python -m tests.matrix` measures all of
it for the installed transformer-lens and writes its part of docs/matrix.md; the parts of other
versions stay as they are.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import ROOT
from tests.helpers import models as zoo
from tests.matrix.cases import variants
from tests.matrix.compare import ANALYSES, compared

_INTRODUCTION = """# Architectures x analyses

Tiny random models of every architecture, each analysis on each class of TransformerLens model.
A number is the largest difference from plain transformers with hand-written PyTorch hooks and
autograd (exact matches are equal to those of `generate`): in nats per token or probability, for
gradients relative to the largest. Where folding gives weights another meaning it is the difference
from the other class in the same basis (marked c), and `ran` where there is no other class. Written
by `python -m tests.matrix`, once for each version of transformer-lens.
"""


def table() -> str:
    """The section of the installed transformer-lens."""
    version = importlib.metadata.version("transformer-lens")
    lines = [
        f"## transformer-lens {version}",
        "",
        "| architecture | model | " + " | ".join(ANALYSES) + " |",
        "| --- | --- |" + " --- |" * len(ANALYSES),
    ]
    for name in zoo.ARCHITECTURES:
        for variant in variants():
            cells = []
            for analysis, line in ANALYSES.items():
                off = compared(name, variant, analysis)
                mark = "" if line.plain and variant.split()[1] in line.bases else " c"
                missing = "refused" if name in line.refused else "ran"
                cells.append(missing if off is None else f"{off:.0e}{mark}")
                assert off is None or off <= line.tolerance, (name, variant, analysis, off)
            lines.append(f"| {name} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *other_lines()])


def other_lines() -> list[str]:
    """What became of the architectures that are tried in less detail (tests/test_architectures)."""
    works, refused = [], []
    for name in (*zoo.OTHERS, *zoo.REFUSED):
        source = zoo.other(name)
        kind = type(source).__name__
        try:
            result = as_bridge(source, zoo.tokenizer(), name="tiny")
            mc.find_memorization_heads(result, zoo.mixed(result), draws=20, progress=False)
        except UnsupportedModel as error:
            reason = str(error).split("; ", 1)[1].partition(" (Could not")[0]
            refused.append(f"| {kind} | {reason.partition('. Available')[0]} |")
        else:
            slow = (
                ""
                if adapt(result).supports_partial_forward
                else " (slower: not continued in the middle)"
            )
            works.append(f"{kind}{slow}")
    assert len(works) == len(zoo.OTHERS)
    return [
        "Also loaded, checked and ranked by `find_memorization_heads`: " + ", ".join(works) + ".",
        "",
        "| refused at load | reason |",
        "| --- | --- |",
        *refused,
        "",
    ]


def write(path: Path) -> None:
    """Replace the section of the installed version, keep the others."""
    sections: dict[str, str] = {}
    if path.is_file():
        for part in path.read_text(encoding="utf-8").split("\n## ")[1:]:
            sections[part.splitlines()[0]] = f"## {part.strip()}\n"
    own = table()
    sections[own.splitlines()[0].removeprefix("## ")] = own
    path.parent.mkdir(exist_ok=True)
    parts = [_INTRODUCTION, *(sections[key] for key in sorted(sections))]
    path.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    target = ROOT / "docs" / "matrix.md"
    write(target)
    print(target)
