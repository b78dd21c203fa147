"""What `Paragraphs` are made of: the rows of files, and texts as token ids.

Both are strict: the first row or text that cannot be used is an error. Scans of corpora put such
rows aside instead (`memcircuits.data.windows.cut`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.data.bos import without_bos
from memcircuits.data.formats.listing import find_sources
from memcircuits.data.formats.records import EMPTY, Row, Source
from memcircuits.data.formats.sources import read_rows
from memcircuits.data.tokens import TokenizerLike, encode


def encode_texts(
    texts: Sequence[str],
    model: TokenizerLike,
    n_prefix: int,
    n_continuation: int,
    bos: tuple[int, ...],
) -> Int[Tensor, "paragraph pos"]:
    """The first tokens of each text, encoded once and without special tokens.

    Args:
        texts: one paragraph each.
        model: model (or tokenizer) that defines the token ids.
        n_prefix: tokens of the prefix.
        n_continuation: tokens of the continuation.
        bos: ids of the tokens in front; texts that begin with them begin behind them.

    Raises:
        InputError: if there is no text, or one is too short.
    """
    if not texts:
        raise InputError("texts", "empty", "give at least one paragraph")
    at_least("n_prefix", n_prefix, 1)
    at_least("n_continuation", n_continuation, 1)
    length = n_prefix + n_continuation
    rows = [without_bos(encode(text, model), bos) for text in texts]
    short = [i for i, row in enumerate(rows) if len(row) < length]
    if short:
        raise InputError(
            "texts",
            f"text {short[0]} has {len(rows[short[0]])} tokens ({len(short)} are too short)",
            f"each needs n_prefix + n_continuation = {length}; "
            "give longer texts or smaller lengths",
        )
    return torch.tensor([row[:length] for row in rows], dtype=torch.long)


def read_usable_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a file, folder or dataset.

    Raises:
        InputError: if there is none, or one cannot be used.
    """
    sources = find_sources(path)
    rows = [row for source in sources for row in _usable_rows(source)]
    if not rows:
        empty = f"{sources[0].name} is empty"
        raise InputError("paragraphs", empty, "give at least one paragraph")
    return rows


def _usable_rows(source: Source) -> Iterator[Row]:
    """The rows of a file; the first that cannot be used is an error, an empty file is not."""
    for row in read_rows(source):
        if isinstance(row, Row):
            yield row
        elif row.reason != EMPTY:
            raise InputError("paragraphs", row.where, row.reason)
