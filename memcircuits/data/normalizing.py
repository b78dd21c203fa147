"""Text hygiene: what copying and saving does to a text, undone before it is encoded.

A text that was saved on Windows, copied from a page or typeset differs from the one that a model
read in ways that nobody sees, and is then not recited. With `normalize="auto"`, the default,

| kind | characters | become |
| --- | --- | --- |
| line ends | CR LF, CR | LF |
| byte-order marks | U+FEFF | nothing |
| non-breaking spaces | U+00A0, U+2007, U+202F | a space |
| zero-width spaces | U+200B, U+2060 | nothing |
| soft hyphens | U+00AD | nothing |
| decomposed characters | letters with marks of their own (NFD) | the composed letter (NFC) |

Joiners (U+200C, U+200D), marks of direction and compatibility characters stay: they are part of
words in many scripts. `normalize="none"` keeps texts as they are written.

A model may also have been trained on text as it is written. Which is better is measured, not
assumed: paragraphs keep the ids of both, and a scan reports the EM of both.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from memcircuits.base.errors import one_of
from memcircuits.data.formats.records import Row

Normalize: TypeAlias = Literal["auto", "none"]
"""Whether texts are normalised before they are encoded, or kept as they are written."""

_REPLACED = {
    "line ends": (re.compile("\r\n?"), "\n"),
    "byte-order marks": (re.compile("\ufeff"), ""),
    "non-breaking spaces": (re.compile("[\u00a0\u2007\u202f]"), " "),
    "zero-width spaces": (re.compile("[\u200b\u2060]"), ""),
    "soft hyphens": (re.compile("\u00ad"), ""),
}
_DECOMPOSED = "decomposed characters"
_KINDS = {*_REPLACED, _DECOMPOSED}

MOVED = "border moved"
"""The change of a row whose own border between prefix and continuation leaves no room."""


def check_normalize(normalize: Normalize) -> None:
    """Raise `InputError` unless `normalize` is one of its values."""
    one_of("normalize", normalize, get_args(Normalize))


def normalized(text: str) -> tuple[str, dict[str, int]]:
    """The text, and how many characters of each kind were changed.

    Example:
        >>> normalized("one" + chr(13) + "two" + chr(0x200B))[1]
        {'line ends': 1, 'zero-width spaces': 1}
    """
    changes: dict[str, int] = {}
    if text.isascii() and "\r" not in text:
        return text, changes
    for kind, (pattern, replacement) in _REPLACED.items():
        text, n = pattern.subn(replacement, text)
        if n:
            changes[kind] = n
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        changes[_DECOMPOSED] = max(1, len(text) - len(composed))
    return composed, changes


def normalized_row(row: Row, normalize: Normalize) -> Row:
    """The row with its text normalised, and what was changed among its `changes`."""
    if row.text is None or normalize == "none":
        return row
    text, changes = normalized(row.text)
    if not changes:
        return row
    prefix = None if row.prefix is None else normalized(row.prefix)[0]
    return dataclasses.replace(row, text=text, prefix=prefix, changes={**row.changes, **changes})


def is_rewritten(row: Row) -> bool:
    """Whether the text of a row was changed."""
    return not _KINDS.isdisjoint(row.changes)


def in_words(changes: Mapping[str, int]) -> str | None:
    """`31 line ends, 1 soft hyphen`; None if nothing was changed."""
    counts = (f"{n:,} {kind.removesuffix('s') if n == 1 else kind}" for kind, n in changes.items())
    return ", ".join(counts) or None


def reading_notes(changes: Sequence[Mapping[str, int]]) -> tuple[str, ...]:
    """What was changed in some texts and rows when they were read, in sentences.

    Args:
        changes: for each of them kind -> how often.
    """
    total = total_changes(changes)
    rewritten = {kind: n for kind, n in total.items() if kind in _KINDS}
    removed = {kind: n for kind, n in total.items() if kind not in {*_KINDS, MOVED}}
    notes = []
    if rewritten:
        n = sum(not _KINDS.isdisjoint(change) for change in changes)
        texts = "The text was" if len(changes) == 1 else f"{n} of {len(changes)} texts were"
        notes.append(
            f"{texts} normalised before encoding: {in_words(rewritten)}; "
            'normalize="none" (--normalize none) keeps them as written.'
        )
    if removed:
        n = sum(not removed.keys().isdisjoint(change) for change in changes)
        notes.append(f"Taken away from {n} of {len(changes)} rows: {in_words(removed)}.")
    if MOVED in total:
        notes.append(
            f"In {total[MOVED]} of {len(changes)} rows the given prefix or continuation is "
            "shorter than asked for; these are cut from the beginning of both together. Smaller "
            "lengths keep the border that was given."
        )
    return tuple(notes)


def total_changes(changes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Kind -> how often it occurs in all texts and rows."""
    total: Counter[str] = Counter()
    for change in changes:
        total.update(change)
    return dict(total)
