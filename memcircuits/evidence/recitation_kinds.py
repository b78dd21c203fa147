"""Recite, reconstruct or recollect: why a paragraph may be memorized (arXiv 2406.17746).

Prashanth et al. (2024, section 3) sort memorized sequences into three kinds:

* *recite*: the training data hold the sequence more than `HIGHLY_DUPLICATED` times;
* *reconstruct*: it is a template that can be continued without having been seen, because it repeats
  itself or counts;
* *recollect*: the rest, rare text that follows no template.

A sequence repeats itself here if, from somewhere in its first half to its end (at most two tokens
are left out there), it is one group of tokens at least twice in a row. It counts if a twentieth of
its characters are digits and its numbers, at least six, are up to eight interleaved series, each of
constant step and not all constant. The second rule is stricter than the paper's filter, which also
takes series of changing step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

RecitationKind = Literal["recite", "reconstruct", "recollect", "unknown"]
"""Why a paragraph may be memorized; unknown where only the number of copies could tell."""

Template = Literal["repeating", "incrementing", ""]
"""The template that a paragraph follows; empty for none."""

HIGHLY_DUPLICATED = 5
"""A sequence with more copies than this in the training data is recited."""

_END = 2  # tokens at the end that need not repeat
_MIN_DIGITS = 0.05  # of the characters
_MIN_NUMBERS, _MAX_SERIES = 6, 8


def recitation_kind(duplicates: float | None, template: Template) -> RecitationKind:
    """The kind of a memorized paragraph.

    Args:
        duplicates: copies in the training data; None where that is not known.
        template: see `template_of`.
    """
    if duplicates is not None and duplicates > HIGHLY_DUPLICATED:
        return "recite"
    if template:
        return "reconstruct"
    return "unknown" if duplicates is None else "recollect"


def template_of(ids: Sequence[int], text: str = "") -> Template:
    """The template that a paragraph follows.

    Args:
        ids: its tokens.
        text: its text; without it only repetition is noticed.
    """
    if is_repeating(ids):
        return "repeating"
    return "incrementing" if is_incrementing(text) else ""


def is_repeating(ids: Sequence[int]) -> bool:
    """Whether a sequence is, from its first half to its end, one group of tokens in a row."""
    tokens = list(ids)
    for end in range(len(tokens), max(0, len(tokens) - _END - 1), -1):
        for period in range(1, end // 2 + 1):
            start = end
            while start > period and tokens[start - 1] == tokens[start - 1 - period]:
                start -= 1
            repeated = start - period  # where the first of the groups begins
            if repeated < end / 2 and end - repeated >= 2 * period:
                return True
    return False


def is_incrementing(text: str) -> bool:
    """Whether the numbers of a text count up or down, in one series or several interleaved ones."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    n_digits = sum(character.isdigit() for character in text)
    if len(numbers) < _MIN_NUMBERS or n_digits < _MIN_DIGITS * len(text):
        return False
    for n_series in range(1, min(_MAX_SERIES, len(numbers) // 3) + 1):
        series = [numbers[i::n_series] for i in range(n_series)]
        steps = [{round(b - a, 9) for a, b in pairwise(one)} for one in series]
        if all(len(step) == 1 for step in steps) and any(step != {0.0} for step in steps):
            return True
    return False
