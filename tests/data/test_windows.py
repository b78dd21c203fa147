"""Windows by hand: slices, filters, and the rows that give none."""

import pytest
import torch
from transformers import AutoTokenizer

import memcircuits as mc
from memcircuits.data.formats.records import Row
from memcircuits.data.windows import Windows, cut, n_unique, retokenization_drift
from memcircuits.organism import DATA
from tests.helpers import models as zoo


def row(ids):
    return Row("here", 1, "r", ids=list(ids))


def test_windows_by_hand():
    windows = cut([row(range(10))], None, Windows(2, 3, stride=2, offset=1))
    assert windows.ids.tolist() == [[1, 2, 3, 4, 5], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
    assert windows.names == ["r@1", "r@3", "r@5"]
    assert cut([row(range(10))], None, Windows(2, 3)).ids.tolist() == [[0, 1, 2, 3, 4]]
    assert cut([], None, Windows(2, 3)).ids.shape == (0, 5)


def test_filters_by_hand():
    rows = [row([1, 1, 1, 2]), row([1, 2, 3, 4]), row([4, 3, 2, 1]), row([1, 2, 3, 4])]
    windows = cut(rows, zoo.tokenizer(), Windows(2, 2, min_unique=0.5, deduplicate=True))
    assert windows.ids.tolist() == [[1, 2, 3, 4], [4, 3, 2, 1]]
    assert windows.counts.tolist() == [2, 1]
    assert windows.left_out == {"few different tokens": 1, "duplicate": 1}
    windows = cut(rows, zoo.tokenizer(), Windows(2, 2, drop=("<4> <3>",)))
    assert windows.left_out == {"keyword": 1}
    assert len(windows.ids) == 3
    assert n_unique(torch.tensor([[1, 1, 1, 2], [5, 4, 4, 5]])).tolist() == [2, 2]


def test_ids_of_another_tokenizer_are_bad_rows():
    windows = cut([row([1, 2, 101]), row([1, 2, 100])], None, Windows(1, 2), d_vocab=101)
    assert windows.ids.tolist() == [[1, 2, 100]]
    assert "outside the vocabulary" in windows.bad[0].reason


@pytest.mark.parametrize(
    "options",
    [{"n_prefix": 0}, {"stride": 0}, {"offset": -1}, {"min_unique": 1.0}, {"drop": ("",)}],
)
def test_windows_are_checked(options):
    with pytest.raises(mc.InputError):
        Windows(**options)


def test_drift_counts_texts_that_encode_otherwise():
    """`<0>` is also what unknown words become, so a tokenizer that loses spaces drifts."""

    class Forgetful:
        is_fast = False

        def encode(self, text, add_special_tokens=True):
            return [len(word) for word in text.split()]

        def decode(self, ids, **_):
            return " ".join("x" * min(i, 5) for i in ids)

    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 1, 1]])
    assert retokenization_drift(ids, Forgetful()) == 2
    assert retokenization_drift(zoo.random_ids(5, 24), zoo.tokenizer()) == 0


def test_windows_of_a_document_know_their_lines(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DATA)
    words = [f"word{i} of {i * i}" for i in range(80)]
    lines = "".join(word + ("\n\n" if i % 7 == 6 else " ") for i, word in enumerate(words))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text(lines.replace("\n", " "))
    read = mc.Paragraphs.read(tmp_path, tokenizer, n_prefix=4, n_continuation=4, stride=3)
    for name, line, start in zip(read.names, read.metadata["line"], read.ids, strict=True):
        text = lines if name.startswith("a") else lines.replace("\n", " ")
        n_before = int(name.partition("@")[2] or 0)
        before = tokenizer.decode(tokenizer(text)["input_ids"][:n_before])
        assert text[len(before) :].startswith(tokenizer.decode(start[:2]))
        continuation = tokenizer(text)["input_ids"][: n_before + 4]
        assert line == 1 + tokenizer.decode(continuation).count("\n")
    assert max(read.metadata["line"]) > 15
    first = mc.Paragraphs.read(tmp_path, tokenizer, n_prefix=4, n_continuation=4)
    assert "line" not in first.metadata
