"""The models of the page, what each recites, and what it does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pretrained_page.planted import example

import memcircuits as mc

SEED = 0


class Sizes(NamedTuple):
    """How much each section measures on one model.

    Attributes:
        contrasted: paragraphs of either set that `contrast` compares.
        cut: recitations whose prefixes `cut_prefix` cuts.
        neurons: next-token neurons of each upper layer, and as many random ones.
        looked_up: paragraphs in which `lookups` looks at them.
        tested: recitations that `influence` tests, and as many controls.
        damages: near copies have one token in this many replaced.
        unlearned: recitations that `unlearn` removes, each by an edit of its own.
        masks: subnetworks that `core` trains for either set.
        steps: training steps of a mask.
        masked: maximum number of paragraphs of either set that masks see.
        shuffles: repetitions of `core` with shuffled labels, where the truth is known.
    """

    contrasted: int = 40
    cut: int = 24
    neurons: int = 16
    looked_up: int = 100
    tested: int = 12
    damages: tuple[int, ...] = (20, 10, 5)
    unlearned: int = 6
    masks: int = 12
    steps: int = 100
    masked: int = 24
    shuffles: int = 2


OF_A_LARGE_MODEL = Sizes(8, 4, 1, 8, 4, (10,), 0, 2, 40, 8, 0)
QUICK = Sizes(4, 2, 1, 4, 2, (10,), 1, 2, 3, 4, 1)


@dataclass(frozen=True)
class Subject:
    """A model and two sets of paragraphs of one length.

    Attributes:
        name: what the page calls the model.
        model: the model.
        memorized: paragraphs that it recites.
        control: others.
        sizes: how much is measured on it.
        unigrams: token counts of its training text; None counts the paragraphs.
    """

    name: str
    model: Any
    memorized: mc.Paragraphs
    control: mc.Paragraphs
    sizes: Sizes
    unigrams: mc.UnigramTable | None = None

    def drawn(self, n: int) -> tuple[mc.Paragraphs, mc.Paragraphs]:
        """At most `n` paragraphs of either set, by the seed of the page."""
        generator = torch.Generator().manual_seed(SEED)
        return self.memorized.sample(n, generator), self.control.sample(n, generator)


@contextlib.contextmanager
def subjects(twin: str, *, quick: bool) -> Iterator[list[Subject]]:
    """The organism, its twin and one pretrained model, which recites what was written into it."""
    sizes = QUICK if quick else Sizes()
    with pretrained(QUICK if quick else OF_A_LARGE_MODEL) as large:
        yield [*(shipped(name, sizes) for name in ("organism", twin)), large]


def shipped(name: str, sizes: Sizes) -> Subject:
    """A model that comes with the package, and which of the shipped paragraphs it recites."""
    model = mc.load_model(name)
    role = "control" if name == "organism-planted" else "all"
    scan = mc.scan(model, mc.Paragraphs.shipped(role), progress=False)
    assert scan.memorized is not None
    assert scan.control is not None
    return Subject(
        name, model, scan.memorized, scan.control, sizes, unigrams=mc.UnigramTable.shipped()
    )


@contextlib.contextmanager
def pretrained(sizes: Sizes) -> Iterator[Subject]:
    """SmolLM2-135M-Instruct, four bits a weight, with four paragraphs written into one layer."""
    module = example()
    model = mc.load_model(module.smollm2())
    memorized, control = (
        mc.Paragraphs.from_texts(module.texts(texts), model, **module.LENGTHS)
        for texts in (module.WRITTEN, module.CONTROLS)
    )
    planted = mc.plant(
        model,
        memorized,
        where=module.WHERE,
        control=control,
        steps=150,
        kl_budget=2.0,
        progress=False,
    )
    with planted.apply(model):
        yield Subject("SmolLM2-135M", model, memorized, control, sizes)
