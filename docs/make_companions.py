"""Write docs/companions.md and docs/companions.json: python docs/make_companions.py.

Five companion papers ask questions beside ours; each is asked of the organism, of its twin and of a
pretrained model. Every section is a function `section_NAME(subjects)` in the module NAME of
`companions_page`. `python docs/make_companions.py NAME ...` measures some sections again and keeps
the others; with `--text` nothing is measured, and the page is written from the JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
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


def main(*arguments: str) -> None:
    path = DOCS / "companions.json"
    measured: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "--text" not in arguments:
        from companions_page.subjects import subjects

        with subjects() as everything:
            for name in arguments or available():
                start = time.process_time()
                module = importlib.import_module(f"companions_page.{name}")
                section = getattr(module, f"section_{name}")(everything)
                seconds = round(time.process_time() - start)
                measured[name] = section | {"seconds": seconds}
                print(f"{name}: {seconds} s", flush=True)
                write_atomically(path, to_json(measured))
    write_atomically(path, to_json(measured))
    write_atomically(DOCS / "companions.md", page(measured))


def to_json(measured: Mapping[str, Any]) -> str:
    return json.dumps(measured, indent=1, allow_nan=False) + "\n"


def available() -> list[str]:
    """The sections whose module is there."""
    return [name for name in SECTIONS if (DOCS / "companions_page" / f"{name}.py").exists()]


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
        bounds = "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"
        cells = [row["model"], row["n"], row["seed"], row["what"], f"{row['value']:.3g}", bounds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    failed = section["not_replicated"] or "nothing that was asked here."
    lines += ["", f"**Not replicated:** {failed}", "", f"{section['seconds']} s of one core.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
