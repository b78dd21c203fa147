"""The models of the page, what each recites, and what it does not."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import memcircuits as mc

SHIPPED = ("organism", "organism-twin")
EXAMPLE = Path(__file__).parents[2] / "examples" / "bring_your_own_model.py"


@dataclass(frozen=True)
class Subject:
    """A model and two sets of paragraphs of one length.

    Attributes:
        name: what the page calls the model.
        model: the model.
        memorized: paragraphs that it recites.
        control: others.
        is_large: whether a forward pass is so slow that sections should ask for less.
    """

    name: str
    model: Any
    memorized: mc.Paragraphs
    control: mc.Paragraphs
    is_large: bool = False


@contextlib.contextmanager
def subjects() -> Iterator[list[Subject]]:
    """The organism, its twin and one pretrained model, which recites what was written into it."""
    with pretrained() as large:
        yield [*(shipped(name) for name in SHIPPED), large]


def shipped(name: str) -> Subject:
    """A model that comes with the package, and which of the shipped paragraphs it recites."""
    model = mc.load_model(name)
    role = "control" if name == "organism-planted" else "all"
    scan = mc.scan(model, mc.Paragraphs.shipped(role), progress=False)
    assert scan.memorized is not None
    assert scan.control is not None
    return Subject(name, model, scan.memorized, scan.control)


@contextlib.contextmanager
def pretrained() -> Iterator[Subject]:
    """SmolLM2-135M-Instruct, four bits a weight, with four paragraphs written into one layer."""
    example = _example()
    model = mc.load_model(example.smollm2())
    memorized, control = (
        mc.Paragraphs.from_texts(example.texts(given), model, **example.LENGTHS)
        for given in (example.WRITTEN, example.CONTROLS)
    )
    planted = mc.plant(
        model,
        memorized,
        where=example.WHERE,
        control=control,
        steps=150,
        kl_budget=2.0,
        progress=False,
    )
    with planted.apply(model):
        yield Subject("SmolLM2-135M", model, memorized, control, is_large=True)


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bring_your_own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example  # its dataclasses look themselves up
    spec.loader.exec_module(example)
    return example
