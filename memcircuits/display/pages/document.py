"""A long text with values at its characters: coloured text, and a strip to find places in it.

A book has a million characters and tens of thousands of coloured stretches, more than a browser
scrolls smoothly as elements. So the text is cut into chunks of some thousand characters. Every
chunk is plain text in the page (it can be searched, read without scripts and printed), with the
marked passages in it; the browser lays out those on screen only. `static/document.js` colours the
chunks near the screen by the chosen measure, and takes the colours away from the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np

from memcircuits.base.errors import InputError, one_of
from memcircuits.display.pages.blocks import Block
from memcircuits.display.palette import level
from memcircuits.display.text import clean

Unit = Literal["count", "share", "log10"]
"""What values are: numbers, shares in [0, 1], or decimal logarithms of probabilities."""

_CHUNK = 3000  # characters
_BINS = 600  # of the strip


class Segment(NamedTuple):
    """Characters with the same values: the text, one value per measure, the passage it is in.

    A value is NaN where nothing was measured. Passages are numbered from 1; 0 means none.
    """

    text: str
    values: tuple[float, ...]
    passage: int = 0


@dataclass(frozen=True)
class Measure:
    """A measure to colour the text by.

    Attributes:
        name: what it is.
        low: value of the palest colour, below which text has none.
        high: value of the darkest colour.
        unit: what its values are.
    """

    name: str
    low: float
    high: float
    unit: Unit = "count"

    def __post_init__(self) -> None:
        """Check the unit and the ends of the scale."""
        one_of("unit", self.unit, get_args(Unit))
        if not self.low < self.high:
            raise InputError("low", self.low, f"give a number below high={self.high}")


@dataclass(frozen=True)
class DocumentText(Block):
    """A text whose characters are coloured by measures, and in which passages are marked.

    Attributes:
        segments: the text, cut where a value changes.
        measures: what the values are; the first one is shown at the beginning.
        marks_mean: what the marked passages are.
        monospaced: whether the text is set in a font of equal widths, as code is.
    """

    template: ClassVar[str] = "document.html.j2"
    scripts: ClassVar[tuple[str, ...]] = ("document",)
    segments: Sequence[Segment]
    measures: Sequence[Measure]
    marks_mean: str = "marked"
    monospaced: bool = False

    def __post_init__(self) -> None:
        """Check that every segment has a value for each measure."""
        for segment in self.segments:
            if len(segment.values) != len(self.measures):
                n = len(segment.values)
                raise InputError("segments", f"{n} values", f"give {len(self.measures)}")

    def context(self) -> dict[str, Any]:
        """Chunks with their pieces, the bins of the strip, and the values for the script."""
        chunks = list(_chunks(self.segments))
        known: set[int] = set()
        shown = [_pieces(chunk, known) for chunk in chunks]
        total = sum(map(_length, chunks))
        bins = [_bins(chunk, self.measures, total) for chunk in chunks]
        return {
            "chunks": shown,
            "bins": _placed(bins),
            "n_bins": sum(map(len, bins)),
            "data": {
                "measures": [dataclasses.asdict(measure) for measure in self.measures],
                "chunks": [_numbers(chunk) for chunk in chunks],
                "bins": [bin_ for chunk in bins for bin_ in chunk],
            },
        }


def _length(chunk: Sequence[Segment]) -> int:
    return sum(len(segment.text) for segment in chunk)


def _chunks(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments as they are shown, in chunks that end with a line or else with a word."""
    chunk: list[Segment] = []
    size = 0
    for segment in segments:
        text = clean(segment.text)
        while size + len(text) >= _CHUNK:
            end = _end_of_chunk(text, max(0, _CHUNK - size))
            if end is None:  # the next segment may have a better place
                if size + len(text) < 2 * _CHUNK:
                    break
                end = 2 * _CHUNK - size
                end = text.rfind(" ", 0, end) + 1 or end
            yield [*chunk, segment._replace(text=text[:end])]
            chunk, size, text = [], 0, text[end:]
        if text:
            chunk.append(segment._replace(text=text))
            size += len(text)
    if chunk:
        yield chunk


def _end_of_chunk(text: str, start: int) -> int | None:
    """Where a chunk can end in a text from `start` on: behind a newline; None if there is none."""
    newline = text.find("\n", start)
    return None if newline < 0 else newline + 1


def _pieces(chunk: Sequence[Segment], known: set[int]) -> list[dict[str, Any]]:
    """Text by passage; the first piece of a passage in the document has an anchor."""
    pieces = []
    for passage, group in itertools.groupby(chunk, key=lambda segment: segment.passage):
        text = "".join(segment.text for segment in group)
        pieces.append({"text": text, "passage": passage, "first": passage not in known})
        known.add(passage)
    return pieces


def _numbers(chunk: Sequence[Segment]) -> list[list[float | None]]:
    """For each segment the number of characters, the passage, and the values; None for NaN."""
    return [
        [len(segment.text), segment.passage, *(_short(value) for value in segment.values)]
        for segment in chunk
    ]


def _short(value: float) -> float | None:
    """A value with three digits after the point; infinities are cut at the ends of any scale."""
    if math.isnan(value):
        return None
    rounded = round(min(1e6, max(-1e6, value)), 3)
    return int(rounded) if rounded == int(rounded) else rounded


def _bins(
    chunk: Sequence[Segment], measures: Sequence[Measure], total: int
) -> list[list[int | None]]:
    """The strip's bins of a chunk: whether a passage is in it, and a colour level per measure."""
    length = _length(chunk)
    n = max(1, round(_BINS * length / total))
    ends = np.cumsum([len(segment.text) for segment in chunk])
    firsts = np.searchsorted(ends, np.arange(n) * length // n, side="right")
    lasts = np.searchsorted(ends, np.maximum(1, (np.arange(n) + 1) * length // n) - 1, side="right")
    bins = []
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        covered = chunk[first : last + 1]
        shades = [
            _shade([segment.values[i] for segment in covered], measure)
            for i, measure in enumerate(measures)
        ]
        bins.append([int(any(segment.passage for segment in covered)), *shades])
    return bins


def _shade(values: Sequence[float], measure: Measure) -> int | None:
    """The level of the largest value; None if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return level(max(known), measure.low, measure.high) if known else None


def _placed(bins: Sequence[list[list[int | None]]]) -> list[list[dict[str, Any]]]:
    """The bins of each chunk with their places in the strip."""
    place = itertools.count()
    return [
        [{"x": next(place), "marked": bin_[0], "level": bin_[1]} for bin_ in chunk]
        for chunk in bins
    ]
