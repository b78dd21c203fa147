"""Cutting regions out of the text, and choosing paragraphs and their roles."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from memcircuits.organism_build import paragraph_choice
from tests.organism_build.micro import MICRO, prose


def test_regions_start_at_sentences_and_do_not_overlap() -> None:
    documents = {"a": [prose(5000, 4), prose(2000, 5)], "b": [prose(3000, 6)]}
    regions = paragraph_choice.cut_regions(documents, 20, 100, np.random.default_rng(0))
    assert len(regions) == pytest.approx(20, abs=1)
    for region in regions:
        document = documents[region.source][region.document]
        assert region.end - region.start == 100
        assert region.end <= len(document)
        assert document[region.start].isupper()
        assert region.start == 0 or document[region.start - 2 : region.start] == ". "
    for one in regions:
        for other in regions:
            same = (one.source, one.document) == (other.source, other.document)
            assert one is other or not same or one.end <= other.start or other.end <= one.start


def test_remaining_text_is_the_documents_without_the_regions() -> None:
    documents = {"a": ["One two. Cut this. Three."], "b": ["Whole."]}
    regions = [paragraph_choice.Region("a", 0, 9, 18)]
    assert paragraph_choice.remaining_text(documents, regions) == ["One two.", "Three.", "Whole."]


def test_choice_refuses_short_repetitive_and_shared_rows() -> None:
    stream = np.arange(100, 200)
    rows = [
        [1, 2, 3, 4, 5, 6, 7, 8, 9],  # good; the ninth token is not used
        [1, 2, 3, 4, 5, 6, 7],  # too short
        [1, 2, 3, 4, 1, 2, 3, 4],  # half of the tokens unique
        [11, 12, 150, 151, 152, 15, 16, 17],  # shares three tokens with the stream
        [21, 22, 150, 151, 25, 26, 27, 28],  # shares two only: good
        [31, 32, 33, 34, 35, 4, 5, 6],  # shares three tokens with the first
    ]
    assert paragraph_choice.choose_rows(rows, 8, stream, 3) == [0, 4]


def test_run_hashes_tell_runs_apart_and_find_equal_ones() -> None:
    hashes = paragraph_choice.run_hashes(np.array([1, 2, 3, 1, 2, 3, 2]), 3)
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 4


def test_roles_are_dealt_evenly() -> None:
    settings = replace(MICRO, both=((1, 10), (3, 10)), one_model=((2, 5),), neither=15)
    sources = ["a"] * 40 + ["b"] * 20
    dealt = paragraph_choice.assign_roles(sources, settings, np.random.default_rng(0))
    assert len({region for region, _, _ in dealt}) == 45
    counts = Counter((role, level) for _, role, level in dealt)
    assert counts == {
        ("both", 1): 10,
        ("both", 3): 10,
        ("organism", 2): 5,
        ("twin", 2): 5,
        ("neither", 0): 15,
    }
    n_of_a = Counter((role, level) for region, role, level in dealt if sources[region] == "a")
    share = n_of_a.total() / 45
    for role, n in counts.items():
        assert abs(n_of_a[role] - share * n) < 1
    with pytest.raises(ValueError, match="spare"):
        paragraph_choice.assign_roles(sources[:44], settings, np.random.default_rng(0))
