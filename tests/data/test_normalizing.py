"""Text hygiene: what is undone, what stays, and how it is counted."""

import unicodedata

import pytest

import memcircuits as mc
from memcircuits.data.normalizing import normalized, reading_notes

CAFE = "café"


@pytest.mark.parametrize(
    ("text", "clean", "changes"),
    [
        ("plain", "plain", {}),
        ("é 日本", "é 日本", {}),
        ("a\r\nb\rc\nd", "a\nb\nc\nd", {"line ends": 2}),
        ("\ufeffa\ufeff", "a", {"byte-order marks": 2}),
        ("1\u00a0000\u202f000\u2007m", "1 000 000 m", {"non-breaking spaces": 3}),
        ("a\u200bb\u2060c", "abc", {"zero-width spaces": 2}),
        ("co\u00adoperate", "cooperate", {"soft hyphens": 1}),
        (unicodedata.normalize("NFD", CAFE), CAFE, {"decomposed characters": 1}),
        ("\u212b", "\u00c5", {"decomposed characters": 1}),
        ("\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None, {}),  # a joiner in Persian
        ("👩\u200d💻", None, {}),
        ("ﬁ x² ①", None, {}),  # compatibility characters
    ],
)
def test_every_kind_is_undone_and_counted(text, clean, changes):
    assert normalized(text) == (text if clean is None else clean, changes)
    assert normalized(normalized(text)[0])[1] == {}


def test_changes_in_sentences():
    changes = [{"line ends": 30}, {}, {"line ends": 1, "padding tokens": 5}]
    first, second = reading_notes(changes)
    assert first.startswith("2 of 3 texts were normalised before encoding: 31 line ends;")
    assert reading_notes([{"line ends": 1}])[0].startswith(
        "The text was normalised before encoding: 1 line end;"
    )
    assert second == "Taken away from 1 of 3 rows: 5 padding tokens."
    assert reading_notes([{}, {}]) == ()


def test_unknown_values_are_refused():
    with pytest.raises(mc.InputError, match="normalize: 'nfc'; choose one of auto, none"):
        mc.Paragraphs.from_texts(["a"], None, normalize="nfc")
