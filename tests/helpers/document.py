"""A map of a long text, without a model: what pages and browsers are tried with."""

from __future__ import annotations

import random

import numpy as np
import torch

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.document.document_map import DocumentMap
from memcircuits.results.provenance import Provenance, versions

WORDS = ("the", "of", "and", "to", "in", "that", "he", "was", "it", "his", "with", "had", "for")
N_PASSAGES = 40
_N_PREFIX = _N_CONTINUATION = 50
_STRIDE = 10


def words(paragraphs: Paragraphs) -> str:
    """A text for the tokenizer of tiny models: a line of words for each paragraph."""
    rows = paragraphs.ids.tolist()
    return "\n".join(" ".join(f"<{token}>" for token in row) for row in rows)


def prose(n_characters: int) -> str:
    """Paragraphs of common words."""
    generator = random.Random(0)
    parts: list[str] = []
    while sum(map(len, parts)) < n_characters:
        words = [generator.choice(WORDS) for _ in range(generator.randint(40, 400))]
        parts.append(" ".join(words).capitalize() + ".\n\n")
    return "".join(parts)


def long_map(n_characters: int, beginning: str = "") -> DocumentMap:
    """Tokens of four characters, chance numbers, and windows here and there recited in full."""
    text = beginning + prose(n_characters)
    ends = np.minimum(np.arange(4, len(text) + 4, 4), len(text))
    starts = np.arange(0, len(ends) - _N_PREFIX - _N_CONTINUATION + 1, _STRIDE)
    generator = np.random.default_rng(0)
    em = np.minimum(generator.geometric(0.35, len(starts)) - 1, _N_CONTINUATION - 1)
    log_prob = -generator.gamma(8, 20, len(starts))
    loose_match = generator.beta(4, 6, len(starts))
    for place in np.linspace(0, len(starts) - 30, N_PASSAGES).astype(int):
        recited = slice(place, place + int(generator.integers(1, 5)))
        em[recited], log_prob[recited], loose_match[recited] = _N_CONTINUATION, -1.5, 1
    model = {"name": "chance", "architecture": "none", "dtype": "float32", "fingerprint": "0"}
    return DocumentMap(
        name="book.txt",
        text=text,
        token_starts=torch.from_numpy(np.concatenate([[0], ends[:-1]])),
        token_ends=torch.from_numpy(ends),
        n_prefix=_N_PREFIX,
        n_continuation=_N_CONTINUATION,
        stride=_STRIDE,
        starts=torch.from_numpy(starts),
        measures={
            "em": torch.from_numpy(em),
            "nll": torch.from_numpy(-log_prob / _N_CONTINUATION),
            "log_prob": torch.from_numpy(log_prob),
            "loose_match": torch.from_numpy(loose_match),
        },
        provenance=Provenance(model, {}, {}, versions()),
    )
