"""In front of text stands what the model's own tokenizer puts there, and it is never counted."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import memcircuits as mc
from memcircuits.data.bos import bos_ids, default_bos
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.models.loading import as_bridge
from tests.helpers import models as zoo

TEXTS = ["<5> <6> <7> <8> <9>", "<10> <11> <12> <13> <14>"]
LENGTHS = {"n_prefix": 2, "n_continuation": 3}


def tokenizer(template: str | None = None, **settings):
    """A word-level tokenizer of `<0>` to `<100>` with a template such as `<1> $A <2>`."""
    vocabulary = {f"<{i}>": i for i in range(zoo.D_VOCAB)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [(f"<{i}>", i) for i in range(4)]
        plain.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    names = {"bos_token": "<1>", "eos_token": "<2>", "pad_token": "<2>", "unk_token": "<0>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **{**names, **settings})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ()),
        ("<1> $A", (1,)),
        ("<2> $A", (2,)),  # as OPT, whose tokenizer puts `</s>` in front
        ("$A <2>", ()),  # as T5: behind a text is not in front of it
        ("<1> $A <2>", (1,)),
        ("<1> <3> $A", (1, 3)),
    ],
)
def test_the_default_is_what_the_tokenizer_puts_in_front(template, expected):
    paragraphs = Paragraphs.from_texts(TEXTS, tokenizer(template), **LENGTHS)
    assert paragraphs.bos == expected
    assert paragraphs.ids.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert paragraphs.inputs[0].tolist() == [*expected, 5, 6, 7, 8, 9]


def test_true_and_false_overrule_the_tokenizer():
    plain, templated = tokenizer(), tokenizer("<2> $A")
    assert Paragraphs.from_texts(TEXTS, plain, bos=True, **LENGTHS).bos == (1,)
    assert Paragraphs.from_texts(TEXTS, templated, bos=True, **LENGTHS).bos == (2,)
    assert Paragraphs.from_texts(TEXTS, templated, bos=False, **LENGTHS).bos == ()
    with pytest.raises(mc.InputError, match="has no BOS token"):
        bos_ids(tokenizer(bos_token=None), True)
    for value in ("yes", 1, None, (1,)):
        with pytest.raises(mc.InputError, match=r"bos: .*choose one of"):
            Paragraphs.from_texts(TEXTS, plain, bos=value, **LENGTHS)


@pytest.mark.parametrize("template", [None, "<1> $A"])
def test_transformer_lens_does_not_change_the_default(template, tmp_path):
    """It reads every tokenizer again with `add_bos_token=True`."""
    tokenizer(template).save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    expected = tuple(own("<5>")["input_ids"][:-1])
    loaded = as_bridge(zoo.hf_model("gpt2"), own, name="tiny")
    assert default_bos(loaded) == expected
    assert loaded.tokenizer("<5>")["input_ids"] == [*expected, 5]
    from transformer_lens.model_bridge import TransformerBridge

    booted = TransformerBridge.boot_transformers(
        "tiny", hf_model=zoo.hf_model("gpt2"), tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    )
    assert booted.tokenizer("<5>")["input_ids"] == [1, 5]
    assert default_bos(booted) == expected


@pytest.mark.skipif(not zoo.has_hooked(), reason="removed in transformer-lens 4.0")
def test_hooked_transformer_does_not_change_the_default():
    model = zoo.hooked("gpt2")
    assert model.tokenizer("<5>")["input_ids"] == [0, 5]
    assert Paragraphs.from_texts(TEXTS, model, **LENGTHS).bos == ()


def test_a_tokenizer_made_in_memory_can_be_wrapped():
    model = as_bridge(zoo.hf_model("llama"), tokenizer("<1> $A"), name="tiny")
    assert Paragraphs.from_texts(TEXTS, model, **LENGTHS).bos == (1,)


def test_rows_of_ids_do_not_get_the_tokens_twice(tmp_path):
    rows = [{"ids": [1, 5, 6, 7, 8, 9]}, {"ids": [10, 11, 12, 13, 14]}]
    split = [{"prefix_ids": [1, 5, 6], "suffix_ids": [7, 8, 9]}]
    path, split_path = tmp_path / "rows.jsonl", tmp_path / "split.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split_path.write_text(json.dumps(split[0]) + "\n")
    model = tokenizer("<1> $A")
    read = Paragraphs.read(path, model, **LENGTHS)
    assert (read.bos, read.ids.tolist()) == ((1,), [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    read = Paragraphs.read(split_path, model, **LENGTHS)
    assert (read.bos, read.prefix.tolist()) == ((1,), [[5, 6]])
    # The caller says no, or there is no model: the ids are as they are in the file.
    for given in (
        Paragraphs.read(path, model, bos=False, **LENGTHS),
        Paragraphs.read(path, **LENGTHS),
    ):
        assert (given.bos, given.ids[0].tolist()) == ((), [1, 5, 6, 7, 8])


def test_from_tokens_takes_what_the_caller_says():
    paragraphs = Paragraphs.from_tokens([[5, 6, 7]], n_prefix=2, bos=[4, 1])
    assert paragraphs.bos == (4, 1)
    assert repr(paragraphs) == "Paragraphs(1 x 2 + 1 tokens, bos=(4, 1))"
    assert paragraphs[0].bos == (paragraphs + paragraphs).bos == (4, 1)
    assert paragraphs.sample(1, torch.Generator()).bos == (4, 1)
    assert paragraphs.hash != Paragraphs.from_tokens([[5, 6, 7]], n_prefix=2).hash
    for bos in (1, "<s>", True, [-1], [1.5]):
        with pytest.raises(mc.InputError, match=r"bos: .*give the token ids"):
            Paragraphs.from_tokens([[5, 6, 7]], n_prefix=2, bos=bos)


def test_counts_leave_out_the_tokens_in_front(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0]}) + "\n" + json.dumps({"ids": [1, 5, 6]}) + "\n")
    table = UnigramTable.from_corpus(path, tokenizer("<1> $A"), progress=False)
    assert table.counts[[1, 5, 6, 9]].tolist() == [0, 2, 2, 1]


def test_a_scan_to_disk_gives_the_numbers_of_a_scan(tmp_path):
    model = as_bridge(zoo.hf_model("gemma2"), tokenizer("<1> $A"), name="tiny")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    windows = Windows(**LENGTHS)
    folder = scan_to_disk(model, path, tmp_path / "out", windows=windows, progress=False)
    expected = mc.scan(model, Paragraphs.read(path, model, **LENGTHS), progress=False)
    assert folder.manifest["bos"] == [1]
    torch.testing.assert_close(torch.tensor(folder.to_frame()["nll"]), expected.nll)
    assert folder.paragraphs(min_em=0).hash == expected.paragraphs.hash
    with pytest.raises(mc.InputError, match="other bos"):
        scan_to_disk(
            model, path, tmp_path / "out", windows=windows, bos=False, resume=True, progress=False
        )
    bare = scan_to_disk(model, path, tmp_path / "bare", windows=windows, bos=False, progress=False)
    assert "read without" in bare.notes[0]
    assert not folder.notes
    # A folder of an older version has no entry, and nothing was in front.
    manifest = tmp_path / "bare" / "manifest.json"
    old = json.loads(manifest.read_text())
    del old["bos"]
    manifest.write_text(json.dumps(old))
    scan_to_disk(
        model, path, tmp_path / "bare", windows=windows, bos=False, resume=True, progress=False
    )
    assert ScanFolder.open(tmp_path / "bare").paragraphs(min_em=0).bos == ()


def test_results_say_when_texts_were_read_otherwise_than_in_training():
    model = as_bridge(zoo.hf_model("llama"), tokenizer("<1> $A"), name="tiny")
    texts = [" ".join(f"<{token}>" for token in range(first, first + 8)) for first in (5, 13)]
    lengths = {
        "n_prefix": 3,
        "n_continuation": 5,
    }  # fewer than five tokens have a note of their own
    read = {bos: Paragraphs.from_texts(texts, model, bos=bos, **lengths) for bos in ("auto", False)}
    assert mc.scan(model, read["auto"], progress=False).notes == ()
    (note,) = mc.scan(model, read[False], progress=False).notes
    assert "puts token 1 (BOS) in front of every text" in note
    assert note in mc.ablate_heads(model, read[False], progress=False).notes
    assert note in mc.perturb_prefix(model, read[False], progress=False).notes
    # Ids that begin with the token are read as in training.
    whole = Paragraphs.from_tokens(read["auto"].inputs, n_prefix=3)
    assert mc.scan(model, whole, progress=False).notes == ()
