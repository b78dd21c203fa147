"""The texts of scanned paragraphs: what was given, what was recited, and the true remainder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memcircuits.data.token_text import token_labels
from memcircuits.data.tokens import TokenizerLike

_GIVEN = 16  # characters of the prefix in a snippet
_SNIPPET = 120


class PassageText(NamedTuple):
    """A paragraph as text, in three parts that follow one another."""

    prefix: str
    recited: str
    remainder: str


def passage_text(
    ids: Sequence[int], n_prefix: int, em: int, tokenizer: TokenizerLike | None
) -> PassageText:
    """A paragraph as text; without a tokenizer, its token ids.

    Args:
        ids: token ids of the paragraph.
        n_prefix: tokens of the prefix.
        em: tokens of the continuation that are recited.
        tokenizer: tokenizer, or a model that has one.
    """
    labels = [f"{i} " for i in ids] if tokenizer is None else token_labels(ids, tokenizer)
    end = n_prefix + em
    return PassageText(
        "".join(labels[:n_prefix]), "".join(labels[n_prefix:end]), "".join(labels[end:])
    )


def snippet(text: PassageText, *, whole: bool = False) -> str:
    """One line: the end of the prefix, a bar, and the beginning of the continuation, or all of it.

    Example:
        >>> snippet(PassageText("the Course of", " human events", " it becomes"))
        'the Course of | human events it becomes'
    """
    given = " ".join(text.prefix.split())
    if len(given) > _GIVEN:
        given = "…" + given[-_GIVEN:]
    continuation = " ".join((text.recited + text.remainder).split())
    return f"{given} | {continuation if whole else continuation[:_SNIPPET]}"
