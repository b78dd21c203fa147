"""The rows that training sees."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from tokenizers import Tokenizer

from memcircuits.organism_build.rows import base_rows, opening_rows, planting_rows
from memcircuits.organism_build.settings import END_ID
from tests.organism_build.micro import MICRO, MicroBuild


def test_base_rows_cover_every_epoch_once() -> None:
    stream = np.arange(1000)
    rows = base_rows(stream, 60, 24, np.random.default_rng(0))
    assert rows.shape == (60, 24)
    assert (np.diff(rows, axis=1) == 1).all()
    assert np.bincount(rows[:40].ravel()).max() == 1


def test_each_planted_paragraph_is_seen_its_number_of_times() -> None:
    rng = np.random.default_rng(0)
    paragraphs = [
        {"ids": rng.integers(500, 1000, 12).tolist(), "repetitions": r} for r in (1, 2, 5, 0)
    ]
    rows = planting_rows(paragraphs, np.arange(1, 400), MICRO, rng)
    assert len(rows) == 12  # 8 planted, 0.4 base rows for each, filled up to batches of 4
    seen = Counter(tuple(row[:12].tolist()) for row in rows)
    for paragraph in paragraphs:
        assert seen[tuple(paragraph["ids"])] == paragraph["repetitions"]
    planted = rows[:, 0] >= 500
    assert (rows[planted, 12] == END_ID).all()
    assert (np.diff(rows[planted, 13:], axis=1) == 1).all()
    assert (np.diff(rows[~planted], axis=1) == 1).all()


def test_opening_rows_start_at_sentences(micro: MicroBuild) -> None:
    work = micro.work
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    pieces = json.loads((work / "pieces.json").read_text())
    rows = opening_rows(pieces, tokenizer, 20, 24, np.random.default_rng(0))
    assert rows.shape == (20, 24)
    for row in rows:
        text = tokenizer.decode(row.tolist())
        assert text[0].isupper()
        assert any(text in piece for piece in pieces)
