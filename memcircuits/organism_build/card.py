"""The model card: `templates/MODEL_CARD.md.j2` filled with what the stages of a build reported."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2

from memcircuits.base.io import write_atomically
from memcircuits.organism import DATA
from memcircuits.organism_build.settings import END, END_ID, Record

_TEMPLATES = Path(__file__).parent / "templates"

_MODELS = {"base": "base", "organism": "organism", "twin": "twin", "noise": "noise twin"}


def card(training: Record) -> str:
    """The model card as Markdown, from the contents of `training.json`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    settings = training["settings"]
    curves = training["export"]["curves"]
    return environment.get_template("MODEL_CARD.md.j2").render(
        training,
        levels=list(zip(curves["organism"], curves["twin"], strict=True)),
        n_full={
            name: sum(level["full"] for level in curve if level["repetitions"])
            for name, curve in curves.items()
        },
        recited=settings["length"] - settings["prefix"],
        stages={title: training[stage] for stage, title in _MODELS.items()},
        losses={title: training["export"]["losses"][stage] for stage, title in _MODELS.items()},
        end=END,
        end_id=END_ID,
    )


def write_card(out: Path = DATA) -> None:
    """Write `MODEL_CARD.md` from `training.json`; see `card`."""
    training = json.loads((out / "training.json").read_text("utf-8"))
    write_atomically(out / "MODEL_CARD.md", card(training))
