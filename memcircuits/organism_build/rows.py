"""The rows of token ids that training sees, in order.

A row is `Settings.context` tokens. Base training sees the training stream cut at a grid. Planting
sees rows that open with a planted paragraph, such rows of the stream, and rows of the training text
that open with a sentence. Without the last kind nearly every row that opens with a sentence would
be a planted paragraph, and the model would come to expect one wherever a text begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from memcircuits.organism_build.paragraph_choice import SENTENCE_START
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
    paragraphs: Sequence[tuple[Sequence[int], int]],
    stream: Int[np.ndarray, " token"],
    openings: Int[np.ndarray, "opening pos"],
    settings: Settings,
    *,
    order: int = 0,
) -> Int[np.ndarray, "batch pos"]:
    """Rows for planting, shuffled.

    A planted row is the paragraph from position 0, the end-of-text token, and base text up to the
    row's end. Each comes with `base_share` base rows, of which `opening_share` open with a
    sentence, and further base rows fill the last batch. Two lists of paragraphs with the same
    repetitions get the same rows in the same order, but for the ids of the paragraphs.

    Args:
        paragraphs: ids and repetitions of each.
        stream: training tokens.
        openings: rows that open with a sentence, at least `Settings.n_openings`.
        settings: row length, shares of base rows, batch, seed.
        order: number of the order; another one shuffles the same rows in another way.
    """
    planted = [ids for ids, repetitions in paragraphs for _ in range(repetitions)]
    n_batches = math.ceil(len(planted) * (1 + settings.base_share) / settings.batch)
    n_openings = round(settings.opening_share * settings.base_share * len(planted))
    rng = np.random.default_rng([settings.seed, 3])
    n_from_stream = n_batches * settings.batch - n_openings
    rows = base_rows(stream, n_from_stream, settings.context, rng)
    with_paragraph = rows[: len(planted)]
    length = settings.length
    with_paragraph[:, length + 1 :] = with_paragraph[:, : -length - 1]
    with_paragraph[:, length] = END_ID
    with_paragraph[:, :length] = planted
    shuffle = np.random.default_rng([settings.seed, 5, order])
    return shuffle.permutation(np.concatenate([rows, openings[:n_openings]]))


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
    return np.array(rows, dtype=np.uint16)
