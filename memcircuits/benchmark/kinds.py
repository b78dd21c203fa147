"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from memcircuits.core.errors import InputError
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.measure.scanning import scan

UNIT = {
    "head": "head",
    "two-heads": "head",
    "values": "head",
    "queries-keys": "head",
    "block": "block",
    "neurons": "neuron",
    "weights": "weight",
}


KINDS = (*UNIT, "holders", "null", "stability")


COUNTS = {
    "head": 106,
    "two-heads": 20,
    "values": 20,
    "queries-keys": 6,
    "block": 8,
    "neurons": 5,
    "weights": 3,
    "holders": 6,
    "null": 2000,
    "stability": 1,
}


QUICK = {"head": 5, "two-heads": 1, "values": 2, "block": 1, "neurons": 1, "holders": 1, "null": 50}


METRICS = ("recall_at_1", "recall_at_k", "mrr", "auc")


RANKINGS = ("find_memorization_heads", "find_memorization_heads (screen)")


N_CONTROLS = 4


N_HOLDERS = 6


DELETED = (0, 1, 2, 4)  # heads ablated together


DELETION_TRIALS = 20


N_OTHERS = 2  # recited paragraphs beside the targets in a deletion curve


# With 50 tokens no head can hold the text in its values alone, nor one in its queries and keys.
CONTINUATION_TOKENS = {"values": 5, "queries-keys": 2}  # of the continuation, all of them elsewhere


PLANTING_STEPS = {"weights": 400}  # of planting, 150 elsewhere; a place that needs more is left out


@dataclass(frozen=True)
class ParagraphPool:
    """Where trials take their paragraphs from.

    Attributes:
        model: HookedTransformer or TransformerBridge.
        unknown: paragraphs that the model does not recite.
        recited: paragraphs that it recites, or None: the others of a deletion curve.
        unigrams: token counts.
    """

    model: Any
    unknown: Paragraphs
    recited: Paragraphs | None
    unigrams: UnigramTable | None

    @classmethod
    def of(cls, model: Any, paragraphs: Any, unigrams: UnigramTable | None = None) -> ParagraphPool:
        """Sort paragraphs by what the model does with them.

        Raises:
            InputError: if too few are unknown to it.
        """
        found = scan(model, Paragraphs.of(paragraphs, model), progress=False)
        unknown = found.control
        if unknown is None or len(unknown) < 60:
            n = 0 if unknown is None else len(unknown)
            raise InputError("paragraphs", f"{n} not recited", "a trial needs at least 60 of them")
        return cls(model, unknown, found.memorized, unigrams)

    def draw(self, generator: torch.Generator, *sizes: int) -> list[Paragraphs]:
        """Disjoint random sets of unknown paragraphs; the last one takes up to 40 of the rest."""
        order = torch.randperm(len(self.unknown), generator=generator)
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        sets = [self.unknown[order[a:b]] for a, b in pairwise(ends)]
        return [*sets, self.unknown[order[ends[-1] : ends[-1] + 40]]]
