"""Clean and corrupted paragraphs: the input of activation patching.

The corrupted counterpart of a paragraph has one prefix token replaced, by the most destructive of
all replacements tried, and continues with what the model then writes (greedily). Where that first
differs from the clean continuation is the first impacted token.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.display.html_table import table_html
from memcircuits.evidence.triggers.scoring import most_destructive
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.adapter import Model


class CleanCorrupted(NamedTuple):
    """Paragraphs and their corrupted counterparts, row by row.

    Attributes:
        clean: the paragraphs as they are.
        corrupted: the same with one prefix token replaced, and the model's new continuation.
            Metadata: `position` of that token, `replacement` (its new id), `em` (tokens of the
            clean continuation still recited) and `first_impacted` (index of the first continuation
            token that differs).
    """

    clean: Paragraphs
    corrupted: Paragraphs

    def _repr_html_(self) -> str:
        import pandas as pd

        frame = pd.DataFrame({"id": self.clean.names, **self.corrupted.metadata})
        return table_html(frame, [f"{len(self.clean):,} paragraphs and corrupted counterparts"])


def most_destructive_pairs(
    model: Model,
    paragraphs: Paragraphs,
    replacements: Int[Tensor, "paragraph pos draw"],
    em: Int[Tensor, "paragraph pos draw"],
    nll: Float[Tensor, "paragraph pos draw"],
) -> CleanCorrupted:
    """Each paragraph with its most destructive replacement: lowest EM, then highest NLL.

    Paragraphs whose continuation this replacement does not change are left out of both sides.

    Args:
        model: decodes the corrupted continuations.
        paragraphs: the clean paragraphs.
        replacements: the token ids put in.
        em: tokens still recited with each of them.
        nll: NLL of the clean continuation with each of them.

    Raises:
        InputError: if no paragraph remains.
    """
    position, draw = most_destructive(em, nll)
    rows = torch.arange(len(paragraphs))
    ids = paragraphs.ids.clone()
    ids[rows, position] = replacements[rows, position, draw]
    corrupted = greedy_continuations(model, paragraphs.with_ids(ids))
    different = corrupted.continuation != paragraphs.continuation
    changed = different.any(-1)
    if not changed.any():
        raise InputError(
            "paragraphs",
            "no single replacement changes a continuation",
            "use more draws or another replacement",
        )
    columns = {
        "position": position,
        "replacement": ids[rows, position],
        "em": em[rows, position, draw],
        "first_impacted": different.long().argmax(-1),
    }
    metadata = {name: tuple(values.tolist()) for name, values in columns.items()}
    corrupted = dataclasses.replace(corrupted, metadata=metadata)
    return CleanCorrupted(paragraphs[changed], corrupted[changed])
