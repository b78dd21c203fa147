"""Text files as documents or paragraphs, windows of whole documents, and rows that are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

import memcircuits as mc
from tests.helpers import models as zoo

LENGTHS = {"n_prefix": 4, "n_continuation": 4}


def words(start: int, n: int) -> str:
    return " ".join(f"<{i}>" for i in range(start, start + n))


@pytest.fixture
def chapters(tmp_path: Path) -> Path:
    """Two chapters with a heading that is too short for a window, and paragraphs that are not."""
    for chapter in (1, 2):
        start = 40 * (chapter - 1)
        text = f"{words(start, 2)}\n\n{words(start + 2, 9)}\n\n{words(start + 11, 9)}\n"
        (tmp_path / f"chapter{chapter}.txt").write_text(text)
    return tmp_path


def ids_of(path: Path, **options: object) -> list[list[int]]:
    read = mc.Paragraphs.read(path, zoo.tokenizer(), **LENGTHS, **options)  # type: ignore[arg-type]
    return read.ids.tolist()


def test_the_files_of_a_folder_are_documents_and_the_note_says_so(chapters: Path) -> None:
    read = mc.Paragraphs.read(chapters, zoo.tokenizer(), **LENGTHS)
    assert read.names == ("chapter1", "chapter2")
    first = zoo.tokenizer().encode((chapters / "chapter1.txt").read_text().strip())
    assert read.ids[0].tolist() == first[:8]
    notes = " ".join(read.notes)
    assert "--txt paragraph" in notes
    assert "2 of 2 rows are longer than 8 tokens" in notes
    assert "--stride 8" in notes


def test_a_stride_reads_documents_to_their_end_across_blank_lines(chapters: Path) -> None:
    path = chapters / "chapter1.txt"
    whole = zoo.tokenizer().encode(path.read_text().strip())
    windows = [whole[i : i + 8] for i in range(0, len(whole) - 7, 8)]
    assert len(windows) == 2
    assert ids_of(path, stride=8) == windows
    assert ids_of(path, txt="document") == windows[:1]
    read = mc.Paragraphs.read(chapters, zoo.tokenizer(), stride=8, **LENGTHS)
    assert read.names == ("chapter1", "chapter1@8", "chapter2", "chapter2@8")
    assert read.groups.tolist() == [0, 0, 1, 1]
    assert not any("longer" in note for note in read.notes)


def test_rows_that_are_too_short_are_errors_or_counted(chapters: Path) -> None:
    path = chapters / "chapter1.txt"
    with pytest.raises(mc.InputError, match=r"line 1; it has 2 tokens, 8 are needed"):
        ids_of(path)
    read = mc.Paragraphs.read(path, zoo.tokenizer(), strict=False, **LENGTHS)
    assert read.names == ("chapter1-00003", "chapter1-00005")
    notes = " ".join(read.notes)
    assert "1 of 3 rows are too short for 8 tokens and were skipped" in notes
    assert "2 of 3 rows are longer" in notes
    assert "--txt document" in notes
    (chapters / "bad.jsonl").write_text('{"text": "' + words(0, 8) + '"}\n{"text": 5}\n')
    notes = mc.Paragraphs.read(chapters, zoo.tokenizer(), strict=False, **LENGTHS).notes
    assert any("1 of 4 rows cannot be used" in note and "line 2" in note for note in notes)


def test_if_no_row_can_be_used_the_first_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 3))
    with pytest.raises(mc.InputError, match="it has 3 tokens, 8 are needed"):
        ids_of(tmp_path / "a.txt", strict=False)
    with pytest.raises(mc.InputError, match="txt: 'line'; choose one of auto, document, paragraph"):
        ids_of(tmp_path / "a.txt", txt="line")
