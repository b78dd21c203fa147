"""Prefix and continuation as two texts, cut anywhere: the ids are those of the whole text."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import memcircuits as mc
from memcircuits.organism import DATA
from tests.helpers import models as zoo

TEXT = (
    "It was the caf\u00e9 of the old town, \u65e5\u672c on its sign, and everybody who came there "
    "knew it well; nobody remembered who had opened it, or when, or why it had two clocks. "
)
LENGTHS = {"n_prefix": 4, "n_continuation": 8}


@pytest.fixture(scope="module")
def byte_level():
    return AutoTokenizer.from_pretrained(DATA)


def encoded(tokenizer, text):
    """Ids of a text, and where each token ends, in characters, by the tokenizer's own offsets."""
    ids, offsets = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[key]
        for key in ("input_ids", "offset_mapping")
    )
    return ids, [end for _, end in offsets]


def test_the_prefix_ends_inside_the_last_word_and_not_after_the_cut(byte_level):
    """At a cut before a space, which no token crosses, it ends exactly there."""
    ids, ends = encoded(byte_level, TEXT)
    n_inside = 0
    for cut in range(ends[10], ends[-9]):
        pair = (TEXT[:cut], TEXT[cut:])
        paragraphs = mc.Paragraphs.from_texts([pair], byte_level, **LENGTHS)
        word = TEXT.rindex(" ", 0, cut)
        first, last = (sum(end <= place for end in ends) for place in (word, cut))
        if TEXT[cut] == " ":
            first = last
        windows = [ids[n - 4 : n + 8] for n in range(first, last + 1)]
        assert paragraphs.ids[0].tolist() in windows
        n_inside += cut not in ends
        assert paragraphs.notes == ()
    assert n_inside > 50


def test_a_cut_between_tokens_is_where_the_prefix_of_the_whole_text_ends(byte_level):
    ids, ends = encoded(byte_level, TEXT)
    whole = mc.Paragraphs.from_texts([TEXT], byte_level, n_prefix=12, n_continuation=8)
    for align in (True, False):
        pair = (TEXT[: ends[11]], TEXT[ends[11] :])
        cut = mc.Paragraphs.from_texts(
            [pair], byte_level, n_prefix=12, n_continuation=8, align=align
        )
        assert cut.hash == whole.hash
        assert cut.names == whole.names
    assert whole.ids[0].tolist() == ids[:20]


def test_apart_the_texts_have_the_tokens_that_each_has_alone(byte_level):
    cut = TEXT.index("erybody")
    pair = (TEXT[:cut], TEXT[cut:])
    apart = mc.Paragraphs.from_texts([pair, TEXT], byte_level, **LENGTHS, align=False)
    before, after = (encoded(byte_level, text)[0] for text in pair)
    assert apart.ids[0].tolist() == before[-4:] + after[:8]
    assert apart.ids[1].tolist() == encoded(byte_level, TEXT)[0][:12]  # one text is no pair
    together = mc.Paragraphs.from_texts([pair], byte_level, **LENGTHS)
    assert not torch.equal(together.ids[0], apart.ids[0])


def test_tokens_in_front_are_those_of_the_whole_text():
    """Tokens of `<5>` and so on, behind a BOS that the tokenizer puts there."""
    plain = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(101)}, unk_token="<0>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="<1> $A", special_tokens=[("<1>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<0>", bos_token="<1>")
    words = " ".join(f"<{i}>" for i in range(10, 26))
    pair = (words[:32], words[32:])
    assert pair[0].endswith(" <1")  # inside the seventh token
    paragraphs = mc.Paragraphs.from_texts([pair], tokenizer, **LENGTHS)
    assert paragraphs.inputs.tolist() == [[1, *range(12, 24)]]
    assert mc.Paragraphs.from_texts([pair], tokenizer, **LENGTHS, bos=False).bos == ()


def test_both_parts_are_normalised(byte_level):
    pair = ("The old\u00a0town was quiet, and ev", "erybody who\r\ncame there knew it well.")
    as_typed = tuple(part.replace("\u00a0", " ").replace("\r\n", "\n") for part in pair)
    lengths = {"n_prefix": 4, "n_continuation": 5}
    for align in (True, False):
        options = {**lengths, "align": align}
        clean = mc.Paragraphs.from_texts([as_typed], byte_level, **options)
        spoiled = mc.Paragraphs.from_texts([pair], byte_level, **options)
        assert torch.equal(spoiled.ids, clean.ids)
        written = mc.Paragraphs.from_texts([pair], byte_level, **options, normalize="none")
        assert torch.equal(spoiled.as_written, written.ids)
        assert not torch.equal(written.ids, clean.ids)


def test_a_recitation_is_recited_after_a_cut_inside_a_token():
    """EM of the tokens up to the end of the text is what it is without the cut."""
    model = mc.load_model()
    recited = mc.scan(model, mc.Paragraphs.shipped("planted"), progress=False).memorized[::20]
    table = model.tokenizer
    pairs = []
    for ids in recited.ids.tolist():
        prefix, text = (table.decode(part) for part in (ids[:50], ids))
        pairs.append((text[: len(prefix) + 2], text[len(prefix) + 2 :]))
    lengths = {"n_prefix": 45, "n_continuation": 40}
    scans = {
        align: mc.scan(
            model, mc.Paragraphs.from_texts(pairs, model, **lengths, align=align), progress=False
        )
        for align in (True, False)
    }
    assert len(pairs) > 1
    assert (scans[True].em >= scans[False].em).all()
    assert scans[True].em.sum() > scans[False].em.sum()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([("a", "b", "c")], "texts: text 0 is tuple; give strings, or pairs of prefix"),
        ([TEXT, ("a", 5)], "texts: text 1 is tuple"),
        ([7], "texts: text 0 is int"),
        ([("<1> <2> ", "<3> <4>")], "texts: text 0; its prefix has 2 tokens; use n_prefix=2"),
    ],
)
def test_what_is_no_text_and_no_pair_is_refused(texts, says):
    with pytest.raises(mc.InputError, match=says):
        mc.Paragraphs.from_texts(texts, zoo.tokenizer(), **LENGTHS)
