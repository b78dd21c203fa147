"""Write docs/companions.md and docs/companions.json: python docs/make_companions.py.

Five companion papers ask questions beside ours; each is asked of the organism, of its twin and of a
pretrained model. Every section is a function `section_NAME(subjects)` in the module NAME of
`companions_page`. `python docs/make_companions.py NAME ...` measures some sections again and keeps
the others; with `--page` nothing is measured, and the page is written from the JSON. A quarter of
an hour of one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memcircuits.base.io import write_atomically

DOCS = Path(__file__).parent
SECTIONS = ("contrast", "lookups", "cut_prefix", "influence", "core")
HEAD = """# Five companion papers

Five papers ask what a reader of ours asks next. Each is an analysis of this package; this page
says what the paper reports, what we measured on the organism, on its twin (the same training, some
planted paragraphs exchanged) and on one pretrained model, SmolLM2-135M-Instruct in four bits, and
what did not replicate. The pretrained model recites four invented paragraphs, which were
written into the attention of one of its layers. Written by `python docs/make_companions.py`; the
numbers lie beside it in `companions.json`. Intervals are 95 % bootstrap intervals.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="NAME", help="sections to measure: all")
    parser.add_argument("--twin", default="organism-twin")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the page is written")
    parser.add_argument("--quick", action="store_true", help="a few paragraphs of everything")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"{unknown[0]}: no such section; choose from {', '.join(SECTIONS)}")
    path = given.out / "companions.json"
    measured: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not given.page:
        from companions_page.subjects import subjects

        with subjects(given.twin, quick=given.quick) as models:
            for name in given.sections or SECTIONS:
                measured[name] = measure(name, models)
                write_atomically(path, to_json(measured))
    write_atomically(given.out / "companions.md", page(measured))


def measure(name: str, models: Sequence[Any]) -> dict[str, Any]:
    """One section, and the processor seconds that it took."""
    start = time.process_time()
    module = importlib.import_module(f"companions_page.{name}")
    section: dict[str, Any] = getattr(module, f"section_{name}")(models)
    seconds = round(time.process_time() - start)
    print(f"{name}: {seconds} s", flush=True)
    rows = [{key: defined(value) for key, value in row.items()} for row in section["rows"]]
    return section | {"rows": rows, "seconds": seconds}


def defined(value: Any) -> Any:
    """The value; None in place of NaN, such as the bounds over a single paragraph."""
    return None if isinstance(value, float) and math.isnan(value) else value


def to_json(measured: Mapping[str, Any]) -> str:
    return json.dumps(measured, indent=1, allow_nan=False) + "\n"


def page(measured: Mapping[str, Any]) -> str:
    """The page from the sections, in their order."""
    parts = [HEAD]
    parts += [section_text(name, measured[name]) for name in SECTIONS if name in measured]
    return "\n".join(parts)


def section_text(name: str, section: Mapping[str, Any]) -> str:
    """A heading, the result of the paper, a table of our results, and what did not replicate."""
    lines = [
        f"## `{name}`: {section['question'][0].lower()}{section['question'][1:]}",
        "",
        f"**The paper** ([{section['paper']}](https://arxiv.org/abs/{section['arxiv']}), on "
        f"{section['paper_models']}): {section['paper_found']}",
        "",
        f"**Here.** {section['measured']}",
        "",
        "| model | n | seed | measured | value | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in section["rows"]:
        value = "" if row["value"] is None else f"{row['value']:.3g}"
        bounds = "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"
        cells = [row["model"], row["n"], row["seed"], row["what"], value, bounds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    failed = section["not_replicated"] or "nothing that was asked here."
    lines += ["", f"**Not replicated:** {failed}", "", f"{section['seconds']} s of one core.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
