"""Which columns hold the text, what masks and labels take away, and where pairs are divided."""

import json

import pytest
import torch

import memcircuits as mc
from memcircuits.data.formats.columns import make_row
from memcircuits.data.formats.records import Columns, Source, Unusable
from memcircuits.data.tokens import split_rows
from tests.data.test_formats import IDS, TEXTS, lines
from tests.helpers import models as zoo

SOURCE = Source("a.jsonl", "a.jsonl", "jsonl")
IDS_22 = IDS[0, :22].tolist()


def row_of(record, **columns):
    return make_row(Source("a.jsonl", "a.jsonl", "jsonl", Columns(**columns)), 1, "row 1", record)


@pytest.mark.parametrize(
    ("record", "text", "metadata"),
    [
        ({"text": "good", "tokens": 100}, "good", {"tokens": 100}),
        ({"tokens": ["a", "b"], "text": "good"}, "good", {"tokens": ["a", "b"]}),
        ({"text": None, "content": "good"}, "good", {}),
        ({"TEXT": "good", "Id": 7}, "good", {}),
        ({"text": b"good"}, "good", {}),
        ({"prompt": "go", "completion": "od", "x": 1}, "good", {"x": 1}),
        ({"prompt": "go", "completion": "model", "gt": "od"}, "good", {"completion": "model"}),
        ({"input": "go", "output": "od"}, "good", {}),
        ({"prefix": "go", "suffix": "od"}, "good", {}),
    ],
)
def test_a_column_is_taken_for_what_it_holds(record, text, metadata):
    row = row_of(record)
    assert row.text == text
    assert row.metadata == metadata


def test_named_columns_come_first():
    record = {"text": "shown", "body": "good", "question": "go", "answer": "od"}
    assert row_of(record, text="body").text == "good"
    pair = row_of(record, prefix="question", continuation="answer")
    assert (pair.text, pair.prefix) == ("good", "go")
    assert row_of({"a": [1, 2], "b": [3]}, prefix="a", continuation="b").split == 2
    with pytest.raises(Unusable, match="body was asked for"):
        row_of({"text": "x"}, text="body")
    with pytest.raises(mc.InputError, match="only one of prefix and continuation"):
        Columns(prefix="question")
    with pytest.raises(mc.InputError, match=r"columns: .*; give a mapping of text"):
        Columns.of({"body": "text"})


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_chat_is_refused_with_the_way_on(name):
    with pytest.raises(Unusable, match=f"{name} is a chat; apply the model's chat template"):
        row_of({name: [{"role": "user", "content": "x"}]})


@pytest.mark.parametrize(
    ("record", "ids", "split", "changes"),
    [
        ({}, [5, 6, 7, 8, 0, 0], None, {}),
        ({"attention_mask": [1, 1, 1, 1, 0, 0]}, [5, 6, 7, 8], None, {"padding tokens": 2}),
        ({"attention_mask": [0, 0, 1, 1, 1, 1]}, [7, 8, 0, 0], None, {"padding tokens": 2}),
        (
            {"attention_mask": [1, 1, 1, 1, 1, 0], "special_tokens_mask": [1, 0, 0, 0, 1, 1]},
            [6, 7, 8],
            None,
            {"padding tokens": 1, "special tokens": 2},
        ),
        ({"labels": [5, 6, 7, 8, 0, 0]}, [5, 6, 7, 8, 0, 0], None, {}),
        ({"labels": [-100, -100, 7, 8, -100, -100]}, [5, 6, 7, 8], 2, {}),
        (
            {"attention_mask": [0, 1, 1, 1, 1, 0], "labels": [-100, -100, -100, 8, 0, -100]},
            [6, 7, 8, 0],
            2,
            {"padding tokens": 2},
        ),
    ],
)
def test_masks_and_labels_are_obeyed(record, ids, split, changes):
    row = row_of({"input_ids": [5, 6, 7, 8, 0, 0], **record, "y": 1})
    assert (row.ids, row.split, row.changes) == (ids, split, changes)
    assert row.metadata == {"y": 1}


def test_labels_that_are_no_copy_are_metadata():
    for labels in (1, "spam", [1, 2, 3], [9, 9, 9, 9], [-100] * 4, [[1], 2, 3, 4]):
        row = row_of({"input_ids": [5, 6, 7, 8], "labels": labels})
        assert row.ids == [5, 6, 7, 8]
        assert row.metadata == {"labels": labels}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"attention_mask": [1, 0, 1]}, "leaves out tokens between others"),
        ({"attention_mask": [1, 1]}, "has 2 values for 3 token ids"),
        ({"attention_mask": [0, 0, 0]}, "only padding"),
        ({"input_ids": [5, -100, 7]}, "negative"),
        ({"input_ids": [-1, -1]}, "only padding"),
    ],
)
def test_masks_that_do_not_fit_are_refused(record, says):
    with pytest.raises(Unusable, match=says):
        row_of({"input_ids": [5, 6, 7], **record})


def test_padding_is_no_text(tmp_path):
    ids = [*IDS_22, *[0] * 40]
    mask = [1] * 22 + [0] * 40
    path = tmp_path / "padded.jsonl"
    path.write_bytes(lines([{"input_ids": ids, "attention_mask": mask}]))
    with pytest.raises(mc.InputError, match=r"line 1; it has 22 tokens, 30 are needed"):
        mc.Paragraphs.read(path, n_prefix=10, n_continuation=20)
    paragraphs = mc.Paragraphs.read(path, n_prefix=10, n_continuation=12)
    assert paragraphs.ids.tolist() == [IDS_22]
    assert paragraphs.metadata == {"changed": ("40 padding tokens",)}
    assert paragraphs.notes == ("Taken away from 1 of 1 rows: 40 padding tokens.",)


def test_a_pair_is_divided_where_the_prefix_ends(tmp_path):
    tokens = TEXTS[0].split()
    path = tmp_path / "a.jsonl"
    for space in ((" ", ""), ("", " ")):
        record = {
            "prompt": " ".join(tokens[:14]) + space[0],
            "completion": space[1] + " ".join(tokens[14:]),
        }
        path.write_text(json.dumps(record))
        paragraphs = mc.Paragraphs.read(path, zoo.tokenizer(), n_prefix=10, n_continuation=8)
        assert torch.equal(paragraphs.ids[0], IDS[0, 4:22])
        assert paragraphs.notes == ()
    moved = mc.Paragraphs.read(path, zoo.tokenizer(), n_prefix=10, n_continuation=12)
    assert torch.equal(moved.ids[0], IDS[0, :22])
    assert "shorter than asked for" in moved.notes[0]
    with pytest.raises(mc.InputError, match="its prefix has 14 tokens; use n_prefix=14"):
        mc.Paragraphs.read(path, zoo.tokenizer(), n_prefix=20, n_continuation=12)


def test_a_token_across_the_border_belongs_to_the_continuation():
    class Words:
        """Every token is a word with the space before it."""

        def encode(self, text, add_special_tokens=True):
            return [hash(word) for word in text.replace(" ", "| ").split("|")]

        def decode(self, ids, **_):
            return ""

    row = row_of({"prompt": "one two ", "completion": "three four"})
    ids = [Words().encode(row.text)]
    assert split_rows([row], ids, Words())[0].split == 2
