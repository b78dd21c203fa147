"""Settings and documents of a build that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from memcircuits.organism_build.settings import Record, Settings

MICRO = Settings(
    threads=1,
    vocab_size=384,
    hidden=16,
    layers=1,
    heads=2,
    window=4,
    context=24,
    length=12,
    prefix=6,
    both=((1, 1), (3, 1)),
    one_model=((1, 1), (3, 1)),
    neither=3,
    spare=3.0,
    heldout_rows=3,
    region=90,
    shared_run=6,
    batch=4,
    base_steps=6,
    checkpoints=2,
)


class MicroBuild(NamedTuple):
    """A finished build: its folders, what it was made from, and what it reported."""

    out: Path
    work: Path
    documents: dict[str, list[str]]
    training: Record


def prose(characters: int, seed: int = 0) -> str:
    """Sentences of made-up words."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 8))) for _ in range(400)]
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choice(words, size=rng.integers(5, 12))).capitalize() + ". "
    return text
