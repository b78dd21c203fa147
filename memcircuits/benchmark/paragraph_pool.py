"""The paragraphs that trials draw from, sorted by whether the model recites them.

Planting needs paragraphs that the model does not know, so that it recites them only afterwards.
Deletion curves and the trials without planting also need paragraphs that it recites already.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from memcircuits.base.errors import InputError
from memcircuits.data.draws import first_rows
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.unigrams import UnigramTable
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Model

_MIN_UNKNOWN = 60  # a trial of holders draws 12 targets and anchors, and 40 further anchors
_MAX_REMAINING = 40


@dataclass(frozen=True)
class ParagraphPool:
    """Where trials take their paragraphs from.

    Attributes:
        model: the model that paragraphs are planted in.
        unknown: paragraphs that the model does not recite.
        recited: paragraphs that the model recites, or None; deletion curves compare the targets
            with them.
        unigrams: token counts, or None.
    """

    model: Model
    unknown: Paragraphs
    recited: Paragraphs | None
    unigrams: UnigramTable | None

    @classmethod
    def of(
        cls, model: Model, paragraphs: ParagraphsLike, unigrams: UnigramTable | None = None
    ) -> ParagraphPool:
        """Scan paragraphs and sort them by whether the model recites them.

        Of paragraphs that depend on each other only the first is used: the sets that trials draw
        must be independent.

        Raises:
            InputError: if the model fails to recite fewer than 60 of them.
        """
        given = Paragraphs.of(paragraphs, model)
        scan_result = scan(model, given[first_rows(given.groups)], progress=False)
        unknown = scan_result.control
        if unknown is None or len(unknown) < _MIN_UNKNOWN:
            n = 0 if unknown is None else len(unknown)
            remedy = f"a trial needs at least {_MIN_UNKNOWN} of them"
            raise InputError("paragraphs", f"{n} not recited", remedy)
        return cls(model, unknown, scan_result.memorized, unigrams)

    def draw(self, generator: torch.Generator, *sizes: int) -> list[Paragraphs]:
        """Disjoint random sets of unknown paragraphs.

        Args:
            generator: source of the random order.
            sizes: number of paragraphs in each set.

        Returns:
            One set for each size, and a last set of up to 40 of the remaining paragraphs.
        """
        order = torch.randperm(len(self.unknown), generator=generator)
        bounds = [0, *accumulate(sizes)]
        bounds.append(bounds[-1] + _MAX_REMAINING)
        return [self.unknown[order[start:stop]] for start, stop in pairwise(bounds)]
