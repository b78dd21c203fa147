"""Numbers of a text that no model has anything to do with: its words, how rare, how compressible.

They are the same for the same text whatever model recites it, so a difference between recited and
other texts in them is one of the texts.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.tokens import TokenizerLike, decode
from memcircuits.data.unigrams import UnigramTable

Tagger: TypeAlias = Callable[[str], Sequence[str]]
"""From a text to the part of speech of each of its words."""


def text_features(
    paragraphs: Paragraphs,
    model: TokenizerLike | None,
    unigrams: UnigramTable,
    tagger: Tagger | None,
) -> dict[str, Float[Tensor, " paragraph"]]:
    """Numbers of the text of each continuation.

    Args:
        paragraphs: the paragraphs.
        model: what has the tokenizer; None if there is none, and then only rarity is measured.
        unigrams: token counts.
        tagger: gives the parts of speech, if they are wanted.
    """
    features = {"rarity": -unigrams.log_prob[paragraphs.continuation].mean(-1)}
    if model is None:
        return features
    texts = decode(paragraphs.continuation.tolist(), model)
    words = [text.split() or [""] for text in texts]
    features |= {
        "characters per token": _column(len(t) / paragraphs.n_continuation for t in texts),
        "characters per word": _column(sum(map(len, w)) / len(w) for w in words),
        "compressed size": _column(_compressed_size(text) for text in texts),
    }
    if tagger is not None:
        features |= _parts_of_speech([list(tagger(text)) for text in texts])
    return features


def _column(values: object) -> Float[Tensor, " paragraph"]:
    return torch.tensor(list(values), dtype=torch.float32)  # type: ignore[call-overload]


def _compressed_size(text: str) -> float:
    """Bytes after compression by zlib, per byte."""
    raw = text.encode("utf-8", "replace")
    return len(zlib.compress(raw, 9)) / max(1, len(raw))


def _parts_of_speech(tags: Sequence[Sequence[str]]) -> dict[str, Float[Tensor, " paragraph"]]:
    """Share of each part of speech among the words of each text."""
    if not all(isinstance(tag, str) for text_tags in tags for tag in text_tags):
        raise InputError("tagger", "gives no strings", "give a function from a text to its tags")
    counts = [Counter(text_tags) for text_tags in tags]
    kinds = sorted(set().union(*counts))
    return {
        f"share of {kind}": _column(count[kind] / max(1, count.total()) for count in counts)
        for kind in kinds
    }
