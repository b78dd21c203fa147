"""A long text as a block: nothing of it is lost, and what is cut is cut at lines."""

import math
from itertools import pairwise

import pytest

import memcircuits as mc
from memcircuits.display.pages import DocumentText, Measure, Page, Segment
from memcircuits.display.pages.document import _CHUNK
from memcircuits.display.text import clean
from tests.display.test_pages import HOSTILE
from tests.helpers.document import prose

MEASURES = [Measure("tokens recited", 0, 50), Measure("probability", -10, 0, "log10")]


def block_of(texts):
    """Every second stretch is a passage; values count upwards."""
    segments = [
        Segment(text, (i % 50, math.nan if i % 3 else -i / 10), (i + 1) // 2 * (i % 2))
        for i, text in enumerate(texts)
    ]
    return DocumentText(segments, MEASURES)


@pytest.fixture(scope="module")
def texts():
    book = prose(40_000) + "x" * 20_000 + prose(5_000)
    places = [0, *range(7, len(book), 37), len(book)]
    return [book[a:b] for a, b in pairwise(places)]


def test_nothing_is_lost(texts):
    context = block_of(texts).context()
    shown = ["".join(piece["text"] for piece in chunk) for chunk in context["chunks"]]
    assert "".join(shown) == "".join(texts)
    lengths = [[numbers[0] for numbers in chunk] for chunk in context["data"]["chunks"]]
    assert [sum(chunk) for chunk in lengths] == [len(text) for text in shown]
    assert max(map(len, shown)) <= 2 * _CHUNK
    prose_chunks = [text for text in shown[:-1] if "x" * 100 not in text]
    assert all(text.endswith("\n") for text in prose_chunks)


def test_values_belong_to_their_characters(texts):
    context = block_of(texts).context()
    by_character = []
    for chunk in context["data"]["chunks"]:
        for n, passage, em, log10 in chunk:
            by_character += [(passage, em, log10)] * n
    expected = []
    for i, text in enumerate(texts):
        values = ((i + 1) // 2 * (i % 2), i % 50, None if i % 3 else round(-i / 10, 3))
        expected += [values] * len(text)
    assert by_character == expected
    anchors = [p["passage"] for c in context["chunks"] for p in c if p["passage"] and p["first"]]
    assert anchors == list(range(1, len(texts) // 2 + 1))


def test_the_strip_has_the_largest_values(texts):
    context = block_of(texts).context()
    bins = context["data"]["bins"]
    assert abs(len(bins) - 600) <= len(context["chunks"])
    assert [bin_["x"] for chunk in context["bins"] for bin_ in chunk] == list(range(len(bins)))
    alone = DocumentText([Segment("a" * 500, (5.0,)), Segment("b", (50.0,))], MEASURES[:1])
    shades = [shade for _, shade in alone.context()["data"]["bins"]]
    assert shades[-1] == 20
    assert set(shades[:-2]) == {2}


def test_hostile_text_is_text():
    page = Page("p", [block_of([*HOSTILE, "\r\x00</div><mark id=p9>"])]).render()
    assert page.count("<mark id=") == page.count('<mark id="p')
    shown = block_of(HOSTILE).context()["chunks"]
    assert "".join(p["text"] for c in shown for p in c) == "".join(map(clean, HOSTILE))


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(mc.InputError, match="1 values; give 2"):
        DocumentText([Segment("a", (1.0,))], MEASURES)
    with pytest.raises(mc.InputError, match="unit"):
        Measure("m", 0, 1, "percent")
    with pytest.raises(mc.InputError, match="low: 1"):
        Measure("m", 1, 1)
