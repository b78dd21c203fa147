"""The options of a ranking, checked: those that decide its numbers, and how its steps run."""

from __future__ import annotations

from typing import NamedTuple, TypedDict, get_args

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.evidence.ablation import Mode
from memcircuits.evidence.component_grid import RankedUnit
from memcircuits.evidence.component_scores import Score
from memcircuits.evidence.screening import Method


class RunOptions(TypedDict):
    """How every step runs: maximum bytes per batch, and whether it shows a bar."""

    memory_budget: int | None
    progress: bool


class RankingOptions(NamedTuple):
    """The options of a ranking that decide its numbers; see `find_memorization_components`."""

    units: tuple[RankedUnit, ...]
    score: Score
    mode: Mode
    method: Method
    max_paragraphs: int | None
    draws: int
    seed: int

    def check(self) -> None:
        """Check each of them, and that they go together.

        Raises:
            InputError: for an option outside its range.
        """
        one_of("score", self.score, get_args(Score))
        one_of("mode", self.mode, get_args(Mode))
        one_of("method", self.method, get_args(Method))
        if self.score == "interaction" and (self.method == "screen" or "neuron" in self.units):
            remedy = "it compares every component: use method='exact', without neurons"
            raise InputError("score", "'interaction'", remedy)
        if self.max_paragraphs is not None:
            at_least("max_paragraphs", self.max_paragraphs, 2)
        at_least("draws", self.draws, 1)
        at_least("seed", self.seed, 0)
