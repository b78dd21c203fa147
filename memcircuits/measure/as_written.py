"""What normalising was worth: the same texts scanned as they are written.

A model recites a text in the form in which it read it. Normalising undoes what happened to a text
afterwards (`memcircuits.data.normalizing`); where it changes what the model read, it does harm. The
paragraphs keep the token ids of both forms, and a scan measures both.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.models.adapter import Adapter


def em_as_written(
    adapter: Adapter, paragraphs: Paragraphs, *, memory_budget: int | None = None
) -> dict[int, int]:
    """Index of a paragraph -> EM of its text as written, where that has other token ids."""
    if paragraphs.as_written is None:
        return {}
    rows = torch.nonzero((paragraphs.as_written != paragraphs.ids).any(-1)).flatten()
    if not len(rows):
        return {}
    written = Paragraphs(paragraphs.as_written[rows], paragraphs.n_prefix, bos=paragraphs.bos)
    scores = score_paragraphs(adapter, written, memory_budget=memory_budget)
    return dict(zip(rows.tolist(), (scores.em * scores.finite).tolist(), strict=True))


def comparison(
    em: Int[Tensor, " paragraph"], as_written: dict[int, int], n_continuation: int
) -> tuple[str, ...]:
    """By how much normalising changes EM, in a sentence; none if no ids were changed.

    Args:
        em: EM of all paragraphs, [paragraph].
        as_written: what `em_as_written` gives.
        n_continuation: number of tokens of the continuation.
    """
    if not as_written:
        return ()
    normalized = [int(em[row]) for row in as_written]
    written = list(as_written.values())
    return (
        f"Mean EM of the {len(written)} texts that normalising changed: "
        f"{sum(normalized) / len(written):.2f}, and {sum(written) / len(written):.2f} as written "
        f"(memorized: {normalized.count(n_continuation)}, and {written.count(n_continuation)} as "
        "written).",
    )
