"""Write docs/pretrained.md, docs/pretrained.json and a picture: python docs/make_pretrained.py.

Four parts, each a module of `pretrained_page`: `recited`, what Gemma 3 270M recites of
public-domain texts; `heads`, what that depends on; `planted`, every analysis on SmolLM2-135M with
paragraphs written into it; `forgotten`, one of these paragraphs unlearned and audited. Naming
parts measures them again and keeps the others; with `--text` nothing is measured, and the page is
written from the JSON. Both models come out of packages (340 MB, the extra `gguf`); the picture
needs the extra `dev` and Chromium. The parts take two to five minutes of one core each, and
`forgotten` longer.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from memcircuits.base.io import write_atomically

DOCS = Path(__file__).parent
PARTS = ("recited", "heads", "planted", "forgotten")
HEAD = """# A pretrained model

What one small pretrained model recites of texts that are on very many pages of the web, and every
analysis on another one with paragraphs of known place. Written by `python docs/make_pretrained.py`;
the numbers lie beside this page in `pretrained.json`. Measured on one thread.
"""


def main(*arguments: str) -> None:
    torch.set_num_threads(1)
    for name in [] if "--text" in arguments else arguments or PARTS:
        section = importlib.import_module(f"pretrained_page.{name}").measure()
        write_atomically(
            DOCS / "pretrained.json",
            json.dumps({**known(), name: section}, indent=1, allow_nan=False) + "\n",
        )
    lines = [HEAD]
    for name, section in known().items():
        lines += importlib.import_module(f"pretrained_page.{name}").text(section)
    write_atomically(DOCS / "pretrained.md", "\n".join(lines).rstrip() + "\n")


def known() -> dict[str, Any]:
    """The parts that were measured, in the order of the page."""
    path = DOCS / "pretrained.json"
    measured = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {name: measured[name] for name in PARTS if name in measured}


if __name__ == "__main__":
    main(*sys.argv[1:])
