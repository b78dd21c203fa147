"""Tokenizers: text to ids and back, and how two tokenizers are told apart.

Text is encoded without special tokens: a paragraph is what stands in the corpus, and tokens in
front of it (BOS) are kept beside it (`memcircuits.data.bos`). Decoding is for display only, because
decoding and encoding again does not always give the same ids. The same id means another token to
another tokenizer, so whatever stores ids beside a tokenizer stores `tokenizer_hash` too. A
tokenizer is tried before it encodes the first text (`memcircuits.data.tokenizer_trials`).

Functions take a tokenizer or a model that has one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from memcircuits.base.errors import InputError
from memcircuits.data.formats.records import Row
from memcircuits.data.tokenizer_trials import try_tokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Hugging Face have it."""

    encode: Any
    decode: Any


@runtime_checkable
class HasTokenizer(Protocol):
    """A model with a tokenizer."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""


TokenizerLike: TypeAlias = Tokenizer | HasTokenizer
"""A tokenizer, or a model that has one."""


def tokenizer_of(model: TokenizerLike | None) -> Any:
    """The tokenizer of a model, or `model` itself if it is one.

    Raises:
        InputError: if there is none.
    """
    if hasattr(model, "encode") and hasattr(model, "decode"):
        return model
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("model", type(model).__name__, "it has no tokenizer; pass token ids")
    return tokenizer


def encode(text: str, model: TokenizerLike) -> list[int]:
    """Ids of a text without special tokens.

    Raises:
        InputError: if there is no tokenizer, or it fails its trials.
    """
    tokenizer = tokenizer_of(model)
    try_tokenizer(tokenizer)
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_all(texts: Sequence[str], model: TokenizerLike | None) -> list[list[int]]:
    """Ids of many texts without special tokens, by the tokenizer's batch encoder if it has one.

    Raises:
        InputError: if there is no tokenizer, or it fails its trials.
    """
    if not texts:
        return []
    tokenizer = tokenizer_of(model)
    try_tokenizer(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        return [encode(text, tokenizer) for text in texts]
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def ids_of_rows(rows: Sequence[Row], model: TokenizerLike | None) -> list[list[int]]:
    """Ids of each row: its own, or those of its text.

    Raises:
        InputError: if a row holds text and there is no model.
    """
    text_rows = [row for row in rows if row.texts]
    if text_rows and model is None:
        where = text_rows[0].where
        raise InputError("model", "None", f"{where} holds text: pass the model to encode it")
    encoded = iter(encode_all([text for row in text_rows for text in row.texts], model))
    return [
        row.ids if row.ids is not None else [i for _ in row.texts for i in next(encoded)]
        for row in rows
    ]


def split_rows(
    rows: Sequence[Row], ids: Sequence[Sequence[int]], model: TokenizerLike | None
) -> list[Row]:
    """The rows of which the file separates two texts, with the number of tokens of the prefix.

    Both texts are encoded as one, as a model reads them, unless the row has them apart. The
    continuation begins at the first token that the prefix alone would not give: one that crosses
    the border, such as a word with the space before it, belongs to the continuation.
    """
    prefixes = [row.prefix for row in rows if row.prefix is not None]
    encoded = iter(encode_all(prefixes, model))
    return [
        row if row.prefix is None else dataclasses.replace(row, split=_shared(whole, next(encoded)))
        for row, whole in zip(rows, ids, strict=True)
    ]


def _shared(whole: Sequence[int], part: Sequence[int]) -> int:
    """Number of ids at the beginning in which two sequences agree."""
    pairs = zip(whole, part, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(part)))


def decode(ids: Iterable[Sequence[int]], model: TokenizerLike | None) -> list[str]:
    """Text of each sequence of ids, exactly as the tokenizer decodes it: for display."""
    tokenizer = tokenizer_of(model)
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (16 digits) of the vocabulary: token strings with their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def vocabulary_size(model: TokenizerLike) -> int:
    """Size of the model's unembedding, or of the tokenizer where that is given."""
    cfg = getattr(model, "cfg", None)
    return int(cfg.d_vocab) if cfg is not None else len(tokenizer_of(model))


def refuse_other_tokenizer(argument: str, model: TokenizerLike, other: TokenizerLike) -> None:
    """Raise `InputError` unless two models read the same ids as the same tokens.

    Where one has no tokenizer, the sizes of their vocabularies must be equal.
    """
    tokenizers = [getattr(m, "tokenizer", None) for m in (model, other)]
    if None in tokenizers:
        sizes = [vocabulary_size(m) for m in (model, other)]
        if sizes[0] != sizes[1]:
            raise InputError(
                argument,
                f"a vocabulary of {sizes[1]} tokens",
                f"the model's has {sizes[0]}; give models of the same tokenizer",
            )
        return
    hashes = [tokenizer_hash(tokenizer) for tokenizer in tokenizers]
    if hashes[0] != hashes[1]:
        raise InputError(
            argument,
            f"it has tokenizer {hashes[1]}",
            f"the model's is {hashes[0]}; give models of the same tokenizer",
        )
