"""The rows of token ids that training sees, in order.

A row is `Settings.context` tokens. Base training sees the training stream cut at a grid, planting
mixes such rows with rows that open with a planted paragraph, and settling mixes them with rows
that open with other sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from memcircuits.organism_build.paragraph_choice import SENTENCE_START
from memcircuits.organism_build.records import TextRecord
from memcircuits.organism_build.settings import END_ID, Settings


def base_rows(
    stream: Int[np.ndarray, " token"], n: int, context: int, rng: np.random.Generator
) -> Int[np.ndarray, "batch pos"]:
    """Rows of the training stream; each epoch shifts the grid at random and shuffles it.

    Args:
        stream: training tokens.
        n: number of rows.
        context: tokens of a row.
        rng: source of shifts and orders.
    """
    starts: list[np.ndarray] = []
    while sum(map(len, starts)) < n:
        grid = np.arange(rng.integers(context), stream.size - context, context)
        starts.append(rng.permutation(grid))
    return stream[np.concatenate(starts)[:n, None] + np.arange(context)]


def planting_rows(
    paragraphs: Sequence[TextRecord],
    stream: Int[np.ndarray, " token"],
    settings: Settings,
    rng: np.random.Generator,
) -> Int[np.ndarray, "batch pos"]:
    """Rows for planting, shuffled.

    A planted row is the paragraph from position 0, the end-of-text token, and base text up to the
    row's end. Each comes with `base_share` base rows, and further base rows fill the last batch.

    Args:
        paragraphs: each is planted `repetitions` times.
        stream: training tokens.
        settings: row length, share of base rows, batch.
        rng: source of base rows and of the order.
    """
    planted = [p["ids"] for p in paragraphs for _ in range(p["repetitions"])]
    n_batches = math.ceil(len(planted) * (1 + settings.base_share) / settings.batch)
    rows = base_rows(stream, n_batches * settings.batch, settings.context, rng)
    with_paragraph = rows[: len(planted)]
    length = settings.length
    with_paragraph[:, length + 1 :] = with_paragraph[:, : -length - 1]
    with_paragraph[:, length] = END_ID
    with_paragraph[:, :length] = planted
    return rng.permutation(rows)


def opening_rows(
    pieces: Sequence[str], tokenizer: Tokenizer, n: int, context: int, rng: np.random.Generator
) -> Int[np.ndarray, "batch pos"]:
    """Rows of the training text that start at a sentence or line, as paragraphs do.

    Args:
        pieces: training text.
        tokenizer: its tokenizer.
        n: number of rows; there are fewer where the text has too few starts.
        context: tokens of a row.
        rng: source of the choice.
    """
    starts = [
        (piece, match.start()) for piece in pieces for match in SENTENCE_START.finditer(piece)
    ]
    rows: list[list[int]] = []
    for i in rng.permutation(len(starts)):
        if len(rows) == n:
            break
        piece, start = starts[i]
        # 12 characters per token are more than enough to fill a row.
        ids = tokenizer.encode(piece[start : start + 12 * context]).ids[:context]
        if len(ids) == context:
            rows.append(ids)
    return np.array(rows, dtype=np.int32)
