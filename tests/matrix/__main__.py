"""Every public analysis on every architecture, model class and basis, against plain PyTorch.

`ANALYSES` is the table: to add an analysis, add a line. `python -m tests.matrix` measures all of
it for the installed transformer-lens and writes its part of docs/matrix.md; the parts of other
versions stay as they are.
"""

from __future__ import annotations

import importlib.metadata

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import ROOT
from tests.helpers import models as zoo
from tests.matrix.cases import variants
from tests.matrix.compare import ANALYSES, compared
from tests.matrix.page import write


def table(version: str) -> str:
    """The section of the installed transformer-lens."""
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
    """What became of the architectures that are tried in less detail (tests/models)."""
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


if __name__ == "__main__":
    target, installed = ROOT / "docs" / "matrix.md", importlib.metadata.version("transformer-lens")
    write(target, installed, table(installed))
    print(target)
