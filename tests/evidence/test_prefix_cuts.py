"""Cut prefixes: `scan` at a boundary, covering sequences by enumeration, greedy text by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import memcircuits as mc
from memcircuits.data.token_bytes import TokenBytes
from memcircuits.evidence.prefix_cuts.covering import Cut, covering_sequences
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

pytestmark = pytest.mark.any_version


@pytest.fixture(scope="module")
def organism():
    return mc.load_model()


@pytest.fixture(scope="module")
def recited(organism):
    return mc.scan(organism, mc.Paragraphs.shipped("planted"), progress=False).memorized[::15]


@pytest.fixture(scope="module")
def table(organism):
    return TokenBytes.of(organism)


def n_alike(one, other):
    """Characters that two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def n_recited(model, ids, rest):
    """Characters of `rest` that are decoded greedily, by full forward passes and plain decoding."""
    ids, start, text = torch.tensor([ids]), len(ids), ""
    while rest.startswith(text.rstrip("\ufffd")) and len(text) < len(rest):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        text = model.tokenizer.decode(ids[0, start:].tolist(), clean_up_tokenization_spaces=False)
    return n_alike(text, rest)


def test_bytes_of_tokens_are_the_text(table):
    for paragraph in mc.Paragraphs.shipped()[::40]:
        ids = paragraph.ids[0].tolist()
        text = table.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert b"".join(table.spelled(ids)) == text.encode() == table.text_of(ids)


def test_tokens_that_agree_with_bytes(table):
    part, text = b" th", b" there"
    begins = {i for i, token in enumerate(table.of_id) if token.startswith(part)}
    inside = {i for i, token in enumerate(table.of_id) if token and text.startswith(token)}
    assert set(table.ids_in_order[table.beginning_with(part)]) == begins - table.special
    assert set(table.within(text)) == inside - table.special
    assert len(begins) > 5
    assert len(inside) > 3


def test_sentence_piece_and_other_tokenizers_spell_their_text():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "\u2581the": 1, "\u2581": 2, "<0xC3>": 3, "<0xA9>": 4, "caf": 5}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert pieces.of_id[1:] == (b" the", b" ", b"\xc3", b"\xa9", b"caf")
    assert TokenBytes.of(zoo.tokenizer()).text_of([5, 7]) == b"<5> <7>"


def test_a_cut_at_a_boundary_equals_scan(organism, table):
    paragraphs = mc.Paragraphs.shipped("planted")[::12]
    scan = mc.scan(organism, paragraphs, progress=False)
    cut = mc.cut_prefix(organism, paragraphs, [0], progress=False)
    assert torch.equal(cut.in_full["naive"][:, 0] == 1, scan.is_memorized)
    for i, em in enumerate(scan.em.tolist()):
        right, following = (
            len(b"".join(table.spelled(paragraphs.ids[i].tolist())[50 : 50 + n]).decode())
            for n in (em, em + 1)
        )
        assert right <= cut.recited["naive"][i, 0] <= following


def test_naive_text_is_that_of_encoding_the_cut_text(organism, recited):
    cuts = [-7, 0, 1, 5]
    result = mc.cut_prefix(organism, recited[:2], cuts, progress=False)
    for i in range(2):
        ids = recited.ids[i].tolist()
        text = organism.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        start = len(organism.tokenizer.decode(ids[:50], clean_up_tokenization_spaces=False))
        for j, cut in enumerate(cuts):
            before, rest = text[: start + cut], text[start + cut :]
            given = organism.tokenizer.encode(before, add_special_tokens=False)
            assert result.n_characters[i, j] == len(rest)
            assert result.recited["naive"][i, j] == n_recited(organism, given, rest)


def test_aligned_recites_wherever_the_true_tokens_are_the_likeliest(organism, recited):
    """All tokens of these are greedy choices, from the first continuation token on."""
    result = mc.cut_prefix(organism, recited, progress=False)
    assert (result.in_full["aligned"] == 1).all()
    inside = result.place == 2
    assert inside.any()
    assert result.in_full["naive"][inside].mean() < 0.1
    frame = result.by_place().set_index(["place", "measure"])
    assert frame.loc[("inside a token", "in full"), "missed_low"] > 0.9


def enumerate_covers(model, table, kept, removed):
    """Every token sequence that spells `removed` and reaches its end, with its probability."""
    with torch.no_grad():
        log_p = model(torch.tensor([kept]))[0, -1].double().log_softmax(-1)
    covers = {}
    for token, text in enumerate(table.of_id):
        if token in table.special or not text:
            continue
        if text.startswith(removed):
            covers[(token,)] = math.exp(log_p[token])
        elif removed.startswith(text):
            after = enumerate_covers(model, table, (*kept, token), removed[len(text) :])
            covers |= {(token, *ids): math.exp(log_p[token]) * p for ids, p in after.items()}
    return covers


def test_covering_sequences_are_all_there_are(organism, table, recited):
    ids = recited.ids[0].tolist()
    kept, removed = tuple(ids[:50]), b" the"
    rest = b"re was a man"
    expected = enumerate_covers(organism, table, kept, removed)
    assert len(expected) > 20
    assert any(len(cover) > 2 for cover in expected)
    adapter = adapt(organism)
    with adapter.preserving_state():
        (found,) = covering_sequences(
            adapter, table, [Cut(kept, removed, rest)], tolerance=0.0, memory_budget=None
        )
    assert found.total == pytest.approx(sum(expected.values()), rel=1e-4)
    assert found.unexplored == 0
    texts = {cover: b"".join(table.of_id[i] for i in cover)[len(removed) :] for cover in expected}
    for length in (1, 2, 3):
        right = sum(p for cover, p in expected.items() if texts[cover].startswith(rest[:length]))
        assert dict(enumerate(found.bytes_right, 1)).get(length, 0) == pytest.approx(
            right, rel=1e-4
        )
    true = {start.ids[50:]: p for start, p in found.true}
    agreeing = {c: p for c, p in expected.items() if rest.startswith(texts[c])}
    assert set(true) == set(agreeing)
    for cover, p in agreeing.items():
        assert true[cover] == pytest.approx(p, rel=1e-4, abs=1e-12)


def test_the_marginal_is_a_mean_over_covering_sequences(organism, table, recited):
    (paragraph,), cut = [recited[:1]], 2
    result = mc.cut_prefix(organism, paragraph, [cut], tolerance=0.0, progress=False)
    ids = paragraph.ids[0].tolist()
    tokens = table.spelled(ids)
    at = len(b"".join(tokens[:50])) + cut
    text = b"".join(tokens)
    before = table.tokenizer.encode(text[:at].decode(), add_special_tokens=False)
    n_kept = next(n for n in range(len(before) - 1, 0, -1) if table.of_id[before[n]][:1] == b" ")
    kept = tuple(before[: max(n_kept, len(before) - 3)])
    removed = text[len(b"".join(table.spelled(kept))) : at]
    covers = enumerate_covers(organism, table, kept, removed)
    rest, total, characters = text[at:].decode(), sum(covers.values()), 0.0
    for cover, p in covers.items():
        ahead = b"".join(table.of_id[i] for i in cover)[len(removed) :].decode("utf-8", "replace")
        if p / total > 1e-6 and rest.startswith(ahead):
            n_right = len(ahead) + n_recited(organism, [*kept, *cover], rest[len(ahead) :])
        else:
            n_right = n_alike(ahead, rest)
        characters += p / total * n_right
    assert float(result.recited["marginal"][0, 0]) == pytest.approx(characters, abs=0.01)


def test_cuts_inside_a_character_have_no_naive_text():
    tokenizer_model = mc.load_model()
    text = "It was the caf\u00e9 of the old town, and all who came there knew it well. " * 3
    ids = tokenizer_model.tokenizer.encode(text, add_special_tokens=False)
    table = TokenBytes.of(tokenizer_model)
    n_prefix = next(i for i in range(len(ids)) if "\u00e9".encode()[:1] in table.of_id[ids[i]])
    paragraph = mc.Paragraphs.from_tokens([ids[: n_prefix + 20]], n_prefix=n_prefix)
    inside = b"".join(table.of_id[i] for i in ids[n_prefix:]).index("\u00e9".encode()[1:])
    result = mc.cut_prefix(tokenizer_model, paragraph, [inside, inside + 1], progress=False)
    assert result.recited["naive"].isnan().tolist() == [[True, False]]
    assert result.recited["aligned"].isfinite().all()
    assert "inside a character" in result.notes[0]


def test_tokens_in_front_are_read(organism, recited):
    """The same tokens as prefix or in front: the same text follows."""
    plain = mc.cut_prefix(organism, recited[:2], [1, 3], progress=False)
    moved = mc.Paragraphs.from_tokens(
        recited.ids[:1, 5:], n_prefix=45, bos=recited.ids[0, :5].tolist()
    )
    front = mc.cut_prefix(organism, moved, [1, 3], progress=False)
    assert torch.equal(front.recited["aligned"], plain.recited["aligned"][:1])
    assert torch.equal(front.recited["naive"], plain.recited["naive"][:1])


def test_bad_input_is_refused(organism, recited):
    with pytest.raises(mc.InputError, match=r"cuts: 5000; .* bytes before and \d+ after"):
        mc.cut_prefix(organism, recited, [5000], progress=False)
    with pytest.raises(mc.InputError, match="cuts"):
        mc.cut_prefix(organism, recited, [], progress=False)
    unusual = mc.Paragraphs.from_tokens(zoo.random_ids(2, 22), n_prefix=10)
    with pytest.raises(mc.InputError, match="none of 2 is what its text is encoded as"):
        mc.cut_prefix(organism, unusual, [0], progress=False)
