"""Overlapping windows of one document: what a list names, and how many places there are."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

import memcircuits as mc
from memcircuits.measure.overlapping_windows import are_windows, best_apart, count_places
from tests.helpers import models as zoo

LENGTH, N_CONTINUATION = 10, 4


def windows(starts, document="doc", seed=0):
    """Names and ids of the windows of one document of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, 100, max(starts) + LENGTH)
    names = [f"{document}@{start}" if start else document for start in starts]
    return names, torch.tensor(np.stack([tokens[s : s + LENGTH] for s in starts]))


def test_of_windows_whose_continuations_overlap_or_touch_the_best_is_listed():
    names, ids = windows([0, 1, 4, 9, 14])
    assert best_apart(names, ids, N_CONTINUATION, range(5), 5) == [0, 3, 4]
    assert best_apart(names, ids, N_CONTINUATION, [2, 1, 0, 4, 3], 5) == [2, 4, 3]
    assert best_apart(names, ids, N_CONTINUATION, range(5), 2) == [0, 3]


def test_windows_without_a_gap_are_one_place():
    names, ids = windows([0, 4, 8, 13, 30])
    assert count_places(names, ids, N_CONTINUATION, range(5)) == 3
    assert count_places(names, ids, N_CONTINUATION, [0, 2]) == 2
    assert count_places(names, ids, N_CONTINUATION, []) == 0


def test_other_documents_and_numbers_that_are_no_places_are_apart():
    names, ids = windows([0, 1])
    other_names, other_ids = windows([0, 1], document="other", seed=1)
    both = torch.cat([ids, other_ids])
    assert best_apart([*names, *other_names], both, N_CONTINUATION, range(4), 4) == [0, 2]
    # Records whose ids look like places: their tokens are not those of one document.
    users = ["user@1", "user@2", "user@3"]
    rows = torch.randint(100, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    assert best_apart(users, rows, N_CONTINUATION, range(3), 3) == [0, 1, 2]
    assert count_places(users, rows, N_CONTINUATION, range(3)) == 3
    assert are_windows(users)
    assert not are_windows(["a", "b@c"])


def test_a_scan_lists_one_window_of_each_place(tmp_path):
    model = zoo.bridge("gpt_neo")
    recited = zoo.reciting(model, n=1).ids[0].tolist()
    filler = zoo.random_ids(2, 15, seed=7).tolist()
    document = [*filler[0], *recited, *filler[1]]
    starts = range(len(document) - 22 + 1)
    paragraphs = mc.Paragraphs.from_tokens(
        torch.tensor([document[start : start + 22] for start in starts]),
        n_prefix=10,
        names=[f"doc@{start}" if start else "doc" for start in starts],
    )
    scan = mc.scan(model, paragraphs, progress=False)
    assert scan.em[15] == 12
    assert scan.longest(1).loc[0, "id"] == "doc@15"
    listed = [int(name.partition("@")[2] or 0) for name in scan.longest(50)["id"]]
    assert all(abs(a - b) > 12 for a in listed for b in listed if a != b)
    page = scan.to_html(tmp_path / "scan.html").read_text("utf-8")
    assert f"of {len(starts)} windows" in page
    assert "memcircuits map FILE" in page
    memorized = dataclasses.replace(scan, token_correct=torch.ones_like(scan.token_correct))
    assert memorized.n_places == 1
    assert "which overlap and lie in 1 place" in memorized.to_html(tmp_path / "a.html").read_text()
