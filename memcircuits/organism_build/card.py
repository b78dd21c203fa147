"""The model card: `templates/MODEL_CARD.md.j2` filled with what the stages of a build reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from memcircuits.base.io import write_atomically
from memcircuits.organism import DATA
from memcircuits.organism_build.settings import END, END_ID, Record

_TEMPLATES = Path(__file__).parent / "templates"


def card(training: Record, curve: Sequence[Record] | None = None) -> str:
    """The model card as Markdown.

    Args:
        training: contents of `training.json`.
        curve: duplication curve measured elsewhere, rows as `duplication_curve` gives them;
            otherwise the one measured at export.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    settings = training["settings"]
    curve = curve or training["export"]["curve"]
    stages = (training["base"], training["plant"], training["settle"])
    return environment.get_template("MODEL_CARD.md.j2").render(
        training,
        curve=curve,
        n_full=sum(level["full"] for level in curve if level["repetitions"]),
        recited=settings["length"] - settings["prefix"],
        minutes=sum(stage["seconds"] for stage in stages) / 60,
        end=END,
        end_id=END_ID,
    )


def write_card(out: Path = DATA, curve: Sequence[Record] | None = None) -> None:
    """Write `MODEL_CARD.md` from `training.json`; see `card`."""
    training = json.loads((out / "training.json").read_text("utf-8"))
    write_atomically(out / "MODEL_CARD.md", card(training, curve))
