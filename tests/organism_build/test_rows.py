"""The rows that training sees."""

from __future__ import annotations

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
    paragraphs = [(rng.integers(500, 1000, 12).tolist(), r) for r in (1, 2, 5, 0)]
    openings = np.full((12, 24), 400)
    rows = planting_rows(paragraphs, np.arange(1, 400), openings, MICRO)
    assert len(rows) == 20  # 8 planted, 1.5 base rows for each
    seen = Counter(tuple(row[:12].tolist()) for row in rows)
    for ids, repetitions in paragraphs:
        assert seen[tuple(ids)] == repetitions
    planted = rows[:, 0] >= 500
    opening = rows[:, 0] == 400
    assert opening.sum() == 6  # half of the base rows
    assert (rows[planted, 12] == END_ID).all()
    assert (np.diff(rows[planted, 13:], axis=1) == 1).all()
    assert (np.diff(rows[~planted & ~opening], axis=1) == 1).all()


def test_twins_see_the_same_rows_but_for_their_own_paragraphs() -> None:
    rng = np.random.default_rng(0)
    shared, own, others = rng.integers(500, 1000, (3, 12)).tolist()
    stream, openings = np.arange(1, 400), np.full((12, 24), 400)
    organism = planting_rows([(shared, 3), (own, 5)], stream, openings, MICRO)
    twin = planting_rows([(shared, 3), (others, 5)], stream, openings, MICRO)
    noise = planting_rows([(shared, 3), (own, 5)], stream, openings, MICRO, order=1)
    differs = (organism != twin).any(axis=1)
    assert (organism[differs, :12] == own).all()
    assert (twin[differs, :12] == others).all()
    assert differs.sum() == 5
    assert (organism[:, 12:] == twin[:, 12:]).all()
    assert (organism != noise).any()
    assert sorted(organism.tolist()) == sorted(noise.tolist())


def test_opening_rows_start_at_sentences(micro: MicroBuild) -> None:
    tokenizer = Tokenizer.from_file(str(micro.work / "tokenizer.json"))
    pieces = [text for documents in micro.documents.values() for text in documents]
    rows = opening_rows(pieces, tokenizer, 20, 24, np.random.default_rng(0))
    assert rows.shape == (20, 24)
    for row in rows:
        text = tokenizer.decode(row.tolist())
        assert text[0].isupper()
        assert any(text in piece for piece in pieces)
