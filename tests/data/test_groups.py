"""Which paragraphs depend on each other: by hand, and against all pairs compared exactly."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components

from memcircuits.base.errors import InputError
from memcircuits.data.draws import first_rows, random_order, sample_rows, split_groups
from memcircuits.data.groups import find_groups
from memcircuits.data.paragraphs import Paragraphs


def text(n, length=100, seed=0, vocabulary=5000):
    return torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


def groups_of(ids, names=None, **metadata):
    return find_groups(ids, names or [f"p-{i}" for i in range(len(ids))], metadata).tolist()


def test_different_paragraphs_are_their_own_groups():
    assert groups_of(text(50)) == list(range(50))
    assert Paragraphs.shipped().groups.tolist() == list(range(len(Paragraphs.shipped())))


def test_copies_are_one_group():
    ids = text(3)
    assert groups_of(ids[[0] * 20]) == [0] * 20
    assert groups_of(ids[[2, 0, 2, 1, 0]]) == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("changed", [1, 3, 8])
def test_copies_with_some_tokens_replaced_are_one_group(changed):
    ids = text(30)
    copies = ids.clone()
    copies[:, torch.linspace(0, 99, changed).long()] = 4999
    assert groups_of(torch.cat([ids, copies])) == [*range(30), *range(30)]


def test_a_shared_prefix_makes_a_group_and_a_shared_sentence_does_not():
    same_prefix, same_sentence = text(2), text(2, seed=1)
    same_prefix[1, :55] = same_prefix[0, :55]
    same_sentence[1, :20] = same_sentence[0, :20]
    assert groups_of(same_prefix) == [0, 0]
    assert groups_of(same_sentence) == [0, 1]


def test_overlapping_windows_are_a_chain_although_its_ends_share_nothing():
    document = text(1, 400)[0]
    windows = document.unfold(0, 100, 50)
    assert groups_of(torch.cat([windows, text(1, seed=2)])) == [0] * len(windows) + [1]


def test_windows_are_grouped_by_the_document_in_their_name():
    ids = text(6)
    names = ["a", "a@100", "b@0", "a@200", "b@100#2", "a@5 reasons"]
    # `b@100#2` is the second document of that name, perhaps of another file.
    assert groups_of(ids, names) == [0, 0, 1, 0, 2, 3]


@pytest.mark.parametrize("column", ["document", "document_id", "doc_id", "doc"])
def test_a_column_names_the_document(column):
    values = ("x", "y", None, "x", None)
    assert groups_of(text(5), **{column: values}) == [0, 1, 2, 0, 3]


def test_the_column_group_decides_and_is_completed_where_it_is_missing():
    ids = text(6)[[0, 0, 1, 2, 2, 3]]
    # The caller says that the first two copies are independent; the last two rows say nothing.
    values = ("a", "b", ["list"], ["list"], None, float("nan"))
    assert groups_of(ids, group=values) == [0, 1, 2, 2, 3, 4]
    assert groups_of(ids[[0, 0, 0]], group=(1, "1", 1)) == [0, 1, 0]


def test_groups_are_those_of_all_pairs_compared_exactly():
    generator = torch.Generator().manual_seed(3)
    ids = text(120, 40, vocabulary=300)
    for row in range(40, 120):  # copies with up to ten tokens replaced
        source = int(torch.randint(40, (), generator=generator))
        n = int(torch.randint(1, 11, (), generator=generator))
        ids[row] = ids[source]
        ids[row, torch.randperm(40, generator=generator)[:n]] = 7
    runs = [{tuple(row[i : i + 5]) for i in range(36)} for row in ids.tolist()]
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(ids)), 2)
        if len(runs[i] & runs[j]) >= 0.3 * len(runs[i] | runs[j])
    ]
    rows, columns = np.array(pairs).T
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), (rows, columns)), shape=(120, 120))
    n_components, components = connected_components(graph, directed=False)
    groups = np.array(groups_of(ids))
    assert len(set(zip(groups, components, strict=True))) == n_components == groups.max() + 1


def test_a_thousand_nearly_equal_paragraphs_are_one_group():
    ids = text(1)[[0] * 1000]
    ids[torch.arange(1000), torch.arange(1000) % 100] = torch.arange(1000)
    assert set(groups_of(ids)) == {0}


def test_short_paragraphs_have_groups():
    assert groups_of(torch.tensor([[1, 2], [1, 3], [1, 2]])) == [0, 1, 0]


def test_frames_have_the_groups_and_give_them_back():
    paragraphs = Paragraphs(text(2)[[0, 1, 0]], names=("a", "b", "c"))
    frame = paragraphs.to_frame()
    assert frame["group"].tolist() == [0, 1, 0]
    again = Paragraphs(paragraphs.ids, metadata={"group": tuple(frame["group"])})
    assert again.groups.tolist() == [0, 1, 0]
    given = Paragraphs(paragraphs.ids, metadata={"group": ("x", "y", pd.NA)})
    assert given.to_frame()["group"].tolist()[:2] == ["x", "y"]
    assert given.groups.tolist() == [0, 1, 2]


def test_a_draw_takes_every_group_before_a_second_of_any():
    groups = torch.tensor([0] * 50 + [1, 2, 3])
    for seed in range(5):
        rows = sample_rows(groups, 5, torch.Generator().manual_seed(seed))
        assert rows.tolist() == sorted(rows.tolist())
        assert sorted(set(groups[rows].tolist())) == [0, 1, 2, 3]


def test_draws_of_independent_paragraphs_are_ordinary_draws():
    order = random_order(torch.arange(40), torch.Generator().manual_seed(5))
    expected = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    assert torch.equal(order, expected)
    rows = sample_rows(torch.arange(40), 7, torch.Generator().manual_seed(5))
    assert torch.equal(rows, expected[:7].sort().values)


def test_a_split_leaves_groups_whole():
    groups = torch.tensor([0, 1, 0, 2, 1, 3])
    first, second = split_groups(groups, torch.tensor([4, 2, 0, 1, 5, 3]), 2)
    assert (first.tolist(), second.tolist()) == ([4, 2, 0, 1], [5, 3])
    assert first_rows(groups).tolist() == [0, 1, 3, 5]


def test_controls_of_one_group_cannot_be_split():
    with pytest.raises(InputError, match="control: 5 paragraphs that are copies or parts of one"):
        split_groups(torch.zeros(5, dtype=torch.long), torch.arange(5), 1)
