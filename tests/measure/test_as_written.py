"""Texts that saving and copying changed: found reciting, with the EM of both forms reported."""

import unicodedata

import pytest
import torch

import memcircuits as mc
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.scan import scan_to_disk
from tests.helpers import models as zoo

LENGTHS = {"n_prefix": 10, "n_continuation": 12}


@pytest.fixture(scope="module")
def organism():
    return mc.load_model("organism", device="cpu")


@pytest.fixture(scope="module")
def texts(organism):
    """Planted paragraphs of several lines, none of which is blank."""
    texts = mc.Paragraphs.shipped("planted").texts(organism)
    chosen = [text for text in texts if "\n" in text.strip() == text and "\n\n" not in text]
    return [text for text in chosen if text.isascii()][:6]


def spoil(kind, text):
    return {
        "line ends": lambda: text.replace("\n", "\r\n"),
        "byte-order marks": lambda: "\ufeff" + text,
        "non-breaking spaces": lambda: text.replace(" ", "\u00a0", 3),
        "zero-width spaces": lambda: text[:40] + "\u200b" + text[40:],
        "soft hyphens": lambda: text[:40] + "\u00ad" + text[40:],
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    ["line ends", "byte-order marks", "non-breaking spaces", "zero-width spaces", "soft hyphens"],
)
def test_what_saving_did_to_a_text_is_undone_and_reported(organism, texts, kind):
    spoiled = [spoil(kind, text) for text in texts]
    clean = mc.Paragraphs.from_texts(texts, organism)
    assert clean.notes == ()
    assert clean.as_written is None
    read = mc.Paragraphs.from_texts(spoiled, organism)
    assert torch.equal(read.ids, clean.ids)
    as_it_is = mc.Paragraphs.from_texts(spoiled, organism, normalize="none")
    assert not any("normalised" in note for note in as_it_is.notes)
    assert torch.equal(read.as_written, as_it_is.ids)
    result = mc.scan(organism, read, progress=False)
    written = mc.scan(organism, as_it_is, progress=False)
    assert result.em.tolist() == mc.scan(organism, clean, progress=False).em.tolist()
    assert list(result.metadata["em_as_written"]) == written.em.tolist()
    assert kind in result.notes[-2]
    means = f"{result.em.double().mean():.2f}, and {written.em.double().mean():.2f} as written"
    assert means in result.notes[-1]


def test_only_texts_that_changed_are_scanned_twice(organism, texts):
    mixed = [texts[0], spoil("line ends", texts[1]), texts[2]]
    result = mc.scan(organism, mc.Paragraphs.from_texts(mixed, organism), progress=False)
    first, second, third = result.metadata["em_as_written"]
    assert (first, third) == (None, None)
    assert second is not None
    assert result.metadata["changed"][0] is None
    assert "1 of 3 texts were normalised" in result.notes[-2]
    subset = mc.Paragraphs.from_texts(mixed, organism)[[1]]
    assert list(mc.scan(organism, subset, progress=False).metadata["em_as_written"]) == [second]
    both = subset + mc.Paragraphs.from_texts([texts[0]], organism)
    assert torch.equal(both.as_written[1], both.ids[1])


def test_letters_and_marks_are_composed(organism):
    text = "The café of the naïve fiancée " * 30
    composed = mc.Paragraphs.from_texts([unicodedata.normalize("NFC", text)], organism)
    read = mc.Paragraphs.from_texts([unicodedata.normalize("NFD", text)], organism)
    assert torch.equal(read.ids, composed.ids)
    assert read.metadata["changed"] == ("90 decomposed characters",)


def test_a_scan_to_disk_reports_both_forms(tmp_path, organism, texts):
    (tmp_path / "crlf.txt").write_bytes("\r\n\r\n".join(
        spoil("line ends", text) for text in texts
    ).encode())  # fmt: skip
    folder = scan_to_disk(organism, tmp_path / "crlf.txt", tmp_path / "out", progress=False)
    n_lines = sum(text.count("\n") for text in texts)
    assert folder.summary["changes"] == {"line ends": n_lines}
    clean = mc.scan(organism, mc.Paragraphs.from_texts(texts, organism), progress=False)
    assert folder.summary["as_written"]["normalized"]["em"] == int(clean.em.sum())
    assert folder.summary["memorized"] == int(clean.is_memorized.sum())
    written = mc.Paragraphs.read(tmp_path / "crlf.txt", organism, normalize="none")
    em = mc.scan(organism, written, progress=False).em
    assert folder.summary["as_written"]["as written"]["em"] == int(em.sum())
    assert f"{em.double().mean():.2f} as written" in folder.notes[-1]
    none = scan_to_disk(
        organism, tmp_path / "crlf.txt", tmp_path / "none", normalize="none", progress=False
    )
    assert none.to_frame()["em"].tolist() == em.tolist()
    with pytest.raises(mc.InputError, match=r"other normalize \(none there, auto here\)"):
        scan_to_disk(organism, tmp_path / "crlf.txt", tmp_path / "none", resume=True)


def test_named_columns_in_a_scan_to_disk(tmp_path, neo):
    path = tmp_path / "a.csv"
    text = " ".join(f"<{i}>" for i in range(1, 40))
    path.write_text(f"title,body\nx,{text}\n")
    windows = Windows(10, 12)
    folder = scan_to_disk(
        neo, path, tmp_path / "out", windows=windows, columns={"text": "body"}, progress=False
    )
    assert folder.to_frame()["ids"][0].tolist() == list(range(1, 23))
    assert mc.Paragraphs.read(path, zoo.tokenizer(), **LENGTHS, columns={"text": "body"}).names == (
        "a-00002",
    )
