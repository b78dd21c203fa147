"""The models of the page, what each recites, and what it does not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companions_page.famous import texts

import memcircuits as mc

SHIPPED = ("organism", "organism-twin")
EXAMPLE = Path(__file__).parents[2] / "examples" / "bring_your_own_model.py"
ENOUGH = 12  # of 16 tokens: so much counts as recited by the pretrained model


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


def subjects() -> Iterator[Subject]:
    """The organism, its twin and one pretrained model, one after the other."""
    for name in SHIPPED:
        yield shipped(name)
    yield pretrained()


def shipped(name: str) -> Subject:
    """A model that comes with the package, and which of the shipped paragraphs it recites."""
    model = mc.load_model(name)
    role = "control" if name == "organism-planted" else "all"
    scan = mc.scan(model, mc.Paragraphs.shipped(role))
    assert scan.memorized is not None
    assert scan.control is not None
    return Subject(name, model, scan.memorized, scan.control)


def pretrained() -> Subject:
    """SmolLM2-135M-Instruct, four bits a weight, and texts that everybody has read."""
    spec = importlib.util.spec_from_file_location("bring_your_own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example  # its dataclasses look themselves up
    spec.loader.exec_module(example)
    model = mc.load_model(example.smollm2())
    given = mc.Paragraphs.from_texts(texts(), model, **example.LENGTHS)
    others = mc.Paragraphs.from_texts(example.texts(example.CONTROLS), model, **example.LENGTHS)
    recited = (mc.scan(model, given).em >= ENOUGH).nonzero().flatten()
    return Subject("SmolLM2-135M", model, given[recited], others, is_large=True)
