"""Documents: the characters of every token, against the bytes of byte-level tokens."""

import pytest
import torch
from transformers import AutoTokenizer

import memcircuits as mc
from memcircuits.data.documents import read_document
from memcircuits.organism import DATA

TEXTS = {
    "words": "Hello  world,\n\n  and so on.\t ",
    "accents": "naïve e\u0301 façade",
    "cut characters": "日本語 and 🙂🙂\u200d🙂 end",
    "controls": "a\x00b\ufeffc\u202e",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA)


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_have_the_characters_of_their_bytes(tokenizer, name):
    """In a byte-level vocabulary every character of a token's name is one byte."""
    text = TEXTS[name]
    document = read_document(text, tokenizer, normalize="none")
    assert document.text == text
    n_bytes = [len(token) for token in tokenizer.convert_ids_to_tokens(document.ids.tolist())]
    character_of_byte = [i for i, c in enumerate(text) for _ in c.encode()]
    assert sum(n_bytes) == len(character_of_byte)
    place = 0
    for size, start, end in zip(n_bytes, document.starts, document.ends, strict=True):
        covered = character_of_byte[place : place + size]
        assert (start, end) == (covered[0], covered[-1] + 1)
        place += size


def test_the_ids_are_those_of_the_whole_text(tokenizer):
    text = TEXTS["words"] * 50
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert read_document(text, tokenizer).ids.tolist() == ids


def test_files_are_read_whole(tokenizer, tmp_path):
    path = tmp_path / "code.py"
    path.write_bytes("\ufeffdef f():\r\n    pass\r\n\r\n".encode())
    for given in (path, str(path)):
        document = read_document(given, tokenizer)
        assert (document.name, document.text) == ("code.py", "def f():\n    pass\n\n")
    assert read_document("def f(): pass", tokenizer).name == "text"


def test_what_is_no_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    for path, message in [
        (tmp_path / "empty.txt", "empty.txt; it is empty"),
        (tmp_path / "picture.png", "not UTF-8 text"),
        (tmp_path / "missing.txt", "there is no such file"),
        (tmp_path, "it is a folder"),
        ("", "it is empty"),
        ("\ud800", "surrogate"),
    ]:
        with pytest.raises(mc.InputError, match=message):
            read_document(path, tokenizer)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False
        encode = decode = None

    with pytest.raises(mc.InputError, match=r"tokenizer\.json"):
        read_document("text", Slow())


def test_a_very_long_line_is_a_text(tokenizer):
    assert len(read_document("word " * 10_000, tokenizer).ids) >= 10_000
    assert torch.equal(read_document("a", tokenizer).ends, torch.tensor([1]))
