"""Labels of tokens that are parts of characters: three kinds of tokenizers, and one that hides."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import memcircuits as mc
from memcircuits.data.token_text import row_text, token_labels
from memcircuits.data.tokenizer_trials import PROBES, tokenizer_notes, try_tokenizer
from memcircuits.data.tokens import encode, encode_all
from memcircuits.display.text import clean, text_of_bytes, visible

TEXT = "no 日本 ö 🙂\n"


def fast(raw, **special):
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def byte_level(merges=()):
    """Byte-level BPE as of GPT-2: the 256 bytes and some merges of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return fast(raw, eos_token="<|end|>")


def sentence_piece(words=("\u2581no", "\u2581", "日")):
    """SentencePiece BPE with byte fallback, as of Llama."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for token in ("n", "o", *words):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("\u2581n", "o"), ("\u2581", "n")]
    vocabulary.setdefault("\u2581n", len(vocabulary))
    raw = Tokenizer(models.BPE(vocabulary, merges[::-1], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return fast(raw, unk_token="<unk>")


def word_piece():
    words = ["[UNK]", "naive", "caf", "##e", "日", "本", "##s", ".", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return fast(raw, unk_token="[UNK]")


# 日 is E6 97 A5: the first two bytes are one token here. 本 is E6 9C AC.
CUT = byte_level([("Ġ", "æ"), ("æ", "Ĺ")])


def test_bytes_that_are_no_character_are_written_out():
    assert text_of_bytes("日本".encode()) == "日本"
    assert text_of_bytes("a日".encode()[:3] + b" \xff\xfe b") == "a⟨E6 97⟩ ⟨FF FE⟩ b"
    assert text_of_bytes("\ufffd".encode()) == "⟨EF BF BD⟩"


def test_byte_level_tokens_show_their_bytes():
    ids = encode(TEXT, CUT)
    labels = token_labels(ids, CUT)
    assert labels[:7] == ["n", "o", " ⟨E6⟩", "⟨97⟩", "⟨A5⟩", "⟨E6⟩", "⟨9C⟩"]
    assert token_labels(encode("日", CUT), CUT) == ["⟨E6 97⟩", "⟨A5⟩"]
    assert row_text(ids, CUT) == TEXT
    assert row_text(ids[:4], CUT) == "no ⟨E6 97⟩"
    assert row_text(ids[4:], CUT) == "⟨A5⟩" + TEXT[4:]


def test_sentence_piece_shows_bytes_and_keeps_the_spaces_of_words():
    tokenizer = sentence_piece()
    ids = encode("no 日本 no", tokenizer)
    labels = token_labels(ids, tokenizer)
    assert labels == [" no", " ", "日", "⟨E6⟩", "⟨9C⟩", "⟨AC⟩", " no"]
    assert row_text(ids, tokenizer) == "no 日本 no"
    assert row_text(ids[:5], tokenizer) == "no 日⟨E6 9C⟩"


def test_word_piece_shows_parts_of_words_and_what_it_does_not_know():
    tokenizer = word_piece()
    labels = token_labels(encode("Naïves 日本 ö", tokenizer), tokenizer)
    assert labels == ["naive", "##s", "日", "本", "[UNK]"]


def test_a_tokenizer_that_hides_its_bytes_shows_the_shared_character():
    hiding = SimpleNamespace(
        encode=lambda text, add_special_tokens: CUT.encode(text, add_special_tokens=False),
        decode=CUT.decode,
    )
    ids = encode("a日本", hiding)
    assert token_labels(ids, hiding) == [
        "a",
        "⟨日 1/2⟩",
        "⟨日 2/2⟩",
        *(f"⟨本 {i}/3⟩" for i in (1, 2, 3)),
    ]
    assert token_labels(ids[:2], hiding) == ["a", f"⟨token {ids[1]}⟩"]
    assert "\ufffd" not in row_text(ids[:2], hiding)


@pytest.mark.parametrize("tokenizer", [CUT, sentence_piece(), word_piece()])
def test_no_label_of_any_token_is_the_replacement_character(tokenizer):
    labels = token_labels(range(len(tokenizer)), tokenizer)
    assert len(labels) == len(tokenizer)
    assert not any("\ufffd" in label for label in labels)


def test_labels_of_byte_level_rows_join_to_their_bytes():
    """Against the bytes themselves: every byte of 2,000 random ones is in some label."""
    generator = torch.Generator().manual_seed(0)
    raw = bytes(torch.randint(256, (2000,), generator=generator).tolist())
    alphabet = {b: t for t, b in _bytes_of(CUT).items()}
    ids = CUT.convert_tokens_to_ids([alphabet[byte] for byte in raw])
    assert row_text(ids, CUT) == text_of_bytes(raw)


def _bytes_of(tokenizer):
    """Token -> byte, from the tokenizer's own encoder: the bytes of U+0000 to U+07FF and more."""
    table = {}
    for code in [*range(0x80), *range(0x80, 0x800), 0xE000, *range(0x1000, 0xD000, 0x1000)]:
        raw = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(chr(code))
        table |= dict(zip("".join(t for t, _ in raw), chr(code).encode(), strict=True))
    for code in (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000):
        raw = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(chr(code))
        table |= dict(zip("".join(t for t, _ in raw), chr(code).encode(), strict=True))
    # Bytes that stand in no UTF-8 text stand for themselves.
    return table | {chr(b): b for b in range(0xA1, 0x100) if b not in table.values()}


def test_paragraphs_and_pages_never_show_the_replacement_character():
    ids = encode("日本語" * 10, CUT)
    paragraphs = mc.Paragraphs.from_tokens([ids[1:21]], n_prefix=10)
    shown = [*paragraphs.texts(CUT), *paragraphs.tokens(CUT)]
    assert not any("\ufffd" in text for text in shown)
    assert visible("\ufffd") == clean("\ufffd") == "⟨U+FFFD⟩"


# Trials


def test_a_good_tokenizer_keeps_everything_and_cuts_characters(tmp_path):
    CUT.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    report = try_tokenizer(loaded)
    assert (report.lost, report.checked_against_file, report.cuts_characters) == ((), True, True)
    assert try_tokenizer(loaded) is report
    assert tokenizer_notes(loaded) == ()
    assert try_tokenizer(CUT).properties()["agrees with its file"] is None


def test_what_a_tokenizer_loses_is_named():
    report = try_tokenizer(word_piece())
    assert {"capital letters", "accents", "line breaks"} <= set(report.lost)
    assert not report.cuts_characters
    assert "capital letters" in tokenizer_notes(word_piece())[0]


def test_a_tokenizer_that_differs_from_its_file_is_refused(tmp_path):
    byte_level().save_pretrained(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    other = byte_level([("Ġ", "Ġ")])
    other.name_or_path = str(tmp_path)
    assert file["model"]["merges"] == []
    for call in (lambda: encode("a", other), lambda: encode_all(["a"], other)):
        with pytest.raises(
            mc.InputError, match=r"tokenizer: .* encodes 'a  b    c' as .*; load it"
        ):
            call()
    assert "its own tokenizer.json" in tokenizer_notes(other)[0]


def test_padding_in_the_file_is_no_difference(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_padding(length=30)
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert try_tokenizer(loaded).checked_against_file


def test_special_tokens_that_were_not_asked_for_are_refused():
    class Adding(SimpleNamespace):
        __hash__ = object.__hash__

    adding = Adding(
        encode=lambda text, add_special_tokens: [7, *text.encode()],
        decode=lambda ids, **_: "",
        all_special_ids=[7],
        unk_token_id=3,
    )
    with pytest.raises(mc.InputError, match="puts token 7 in front of every text"):
        encode("a", adding)


def test_a_tokenizer_that_cannot_encode_the_probes_is_not_refused():
    def encode_words(text, add_special_tokens):
        return [{"a": 0, "b": 1}[word] for word in text.split()]

    words = SimpleNamespace(encode=encode_words, decode=lambda ids, **_: "")
    assert encode("a b", words) == [0, 1]
    assert try_tokenizer(words).lost == ("tabs",)  # the one probe of these words


def test_probes_are_of_different_kinds():
    assert len(set(PROBES.values())) == len(PROBES)
    assert all(text == text.lstrip(" ") for text in PROBES.values())
