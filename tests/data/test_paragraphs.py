"""Paragraphs: ids are the truth, and every unusable input is refused with its reason."""

import pytest
import torch

import memcircuits as mc
from memcircuits.data.overlap import refuse_overlap
from tests.helpers import models as zoo

TEXT = " ".join(f"<{i % 101}>" for i in range(120))


def test_from_texts_encodes_once_and_slices():
    paragraphs = mc.Paragraphs.from_texts([TEXT], zoo.tokenizer(), n_prefix=60, n_continuation=30)
    assert paragraphs.ids.tolist() == [[i % 101 for i in range(90)]]
    assert (paragraphs.n_prefix, paragraphs.n_continuation) == (60, 30)
    assert paragraphs.prefix.tolist() == [[i % 101 for i in range(60)]]
    assert paragraphs.texts(zoo.tokenizer())[0].startswith("<0> <1>")


def test_prefix_and_continuation_partition_the_ids():
    paragraphs = mc.Paragraphs.from_tokens(zoo.random_ids(5, 30), n_prefix=12)
    assert torch.equal(
        torch.cat([paragraphs.prefix, paragraphs.continuation], 1), zoo.random_ids(5, 30)
    )


def test_subsets_keep_names_and_metadata_in_step():
    paragraphs = mc.Paragraphs(
        zoo.random_ids(4, 60), 50, ("a", "b", "c", "d"), {"repetitions": (1, 2, 3, 4)}
    )
    for index in ([2, 0], torch.tensor([2, 0])):
        subset = paragraphs[index]
        assert subset.names == ("c", "a")
        assert subset.metadata["repetitions"] == (3, 1)
        assert torch.equal(subset.ids, paragraphs.ids[[2, 0]])
    assert paragraphs[torch.tensor([False, True, False, False])].names == ("b",)
    assert paragraphs[1].names == ("b",)
    assert [p.names[0] for p in paragraphs] == ["a", "b", "c", "d"]
    assert (paragraphs[[0]] + paragraphs[[3]]).metadata["repetitions"] == (1, 4)


def test_hash_knows_ids_and_split():
    ids = zoo.random_ids(3, 60)
    paragraphs = mc.Paragraphs.from_tokens(ids)
    assert paragraphs.hash == mc.Paragraphs.from_tokens(ids.clone()).hash
    assert paragraphs.hash != mc.Paragraphs.from_tokens(ids, n_prefix=49).hash
    other = ids.clone()
    other[0, 0] += 1
    assert paragraphs.hash != mc.Paragraphs.from_tokens(other).hash


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mc.Paragraphs.from_texts([], zoo.tokenizer()), "texts: empty"),
        (lambda: mc.Paragraphs.from_texts(TEXT, zoo.tokenizer()), "list of strings"),
        (
            lambda: mc.Paragraphs.from_texts([TEXT, "<1> <2>"], zoo.tokenizer()),
            "text 1; it has 2",
        ),
        (lambda: mc.Paragraphs.from_tokens([]), "at least one paragraph"),
        (lambda: mc.Paragraphs.from_tokens([[1, 2, 3], [1, 2]]), "equally long"),
        (lambda: mc.Paragraphs.from_tokens(torch.rand(2, 100)), "integer tensor"),
        (lambda: mc.Paragraphs.from_tokens(torch.zeros(100, dtype=torch.long)), "integer tensor"),
        (lambda: mc.Paragraphs.from_tokens(torch.zeros(2, 50, dtype=torch.long)), "longer than"),
        (lambda: mc.Paragraphs.from_tokens(torch.full((2, 100), -1)), "negative"),
        (lambda: mc.Paragraphs.from_tokens(zoo.random_ids(2, 60), n_prefix=0), "n_prefix"),
        (lambda: mc.Paragraphs.from_tokens(zoo.random_ids(2, 60), names=["one"]), "names"),
        (lambda: mc.Paragraphs.shipped("nobody"), "role"),
    ],
)
def test_unusable_input_is_refused(make, says):
    with pytest.raises(mc.InputError, match=says):
        make()


def test_a_sample_is_in_order_and_by_the_generator():
    paragraphs = mc.Paragraphs.from_tokens(zoo.random_ids(30, 22), n_prefix=10)
    expected = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:7].sort().values
    sample = paragraphs.sample(7, torch.Generator().manual_seed(3))
    assert sample.names == tuple(paragraphs.names[i] for i in expected)


@pytest.mark.parametrize("n", [None, 30, 31])
def test_a_sample_of_all_uses_no_random_number(n):
    paragraphs = mc.Paragraphs.from_tokens(zoo.random_ids(30, 22), n_prefix=10)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    assert paragraphs.sample(n, generator) is paragraphs
    assert torch.equal(generator.get_state(), state)


def test_overlap_is_of_paragraphs_or_of_prefixes():
    """Another continuation of the same prefix is another paragraph, but the same input."""
    ids = zoo.random_ids(4, 22)
    memorized = mc.Paragraphs.from_tokens(ids[:2], n_prefix=10)
    other = mc.Paragraphs.from_tokens(ids[2:], n_prefix=10)
    other_continuation = mc.Paragraphs.from_tokens(
        torch.cat([ids[:2, :10], ids[2:, 10:]], 1), n_prefix=10
    )
    for same in ("paragraph", "prefix"):
        refuse_overlap(memorized, other, same=same)
        with pytest.raises(mc.InputError, match=r"control: 1 of its paragraphs"):
            refuse_overlap(memorized, other + memorized[[1]], same=same)
    refuse_overlap(memorized, other_continuation, same="paragraph")
    with pytest.raises(mc.InputError, match="2 of its paragraphs have the prefix"):
        refuse_overlap(memorized, other_continuation, same="prefix")


def test_other_ids_keep_what_stands_in_front_and_drop_what_was_said_of_the_texts():
    ids = torch.tensor([[5, 6, 7, 8]])
    named = {"names": ("a",), "metadata": {"source": ("book",)}, "bos": (1,)}
    read = mc.Paragraphs(ids, 2, **named, as_written=ids + 1, notes=("1 text was normalised",))
    other = read.with_ids(ids + 2)
    assert (other.names, other.metadata, other.bos, other.n_prefix) == (*named.values(), 2)
    assert (other.as_written, other.notes) == (None, ())
    assert read.with_ids(ids[:, 1:], n_prefix=1).inputs.tolist() == [[1, 6, 7, 8]]
