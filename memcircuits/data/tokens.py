"""TODO."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from memcircuits.core.errors import InputError
from memcircuits.data.formats.records import Row


def encoded(rows: Sequence[Row], model: Any) -> list[list[int]]:
    texts = [row.text for row in rows if row.text is not None]
    if texts and model is None:
        where = next(row.where for row in rows if row.text is not None)
        raise InputError("model", "None", f"{where} holds text: pass the model to encode it")
    texts_encoded = iter(encode_all(texts, model))
    return [row.ids if row.ids is not None else next(texts_encoded) for row in rows]


def encode_all(texts: Sequence[str], model: Any) -> list[list[int]]:
    """Ids of many texts without special tokens, by the tokenizer's batch encoder if it has one."""
    if not texts:
        return []
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "is_fast", False):
        return [encode(text, tokenizer) for text in texts]
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model, or `model` itself if it is one.

    Raises:
        InputError: if there is none.
    """
    found = model if hasattr(model, "encode") and hasattr(model, "decode") else None
    found = found or getattr(model, "tokenizer", None)
    if found is None:
        raise InputError("model", type(model).__name__, "it has no tokenizer; pass token ids")
    return found


def encode(text: str, model: Any) -> list[int]:
    """Ids of a text without special tokens."""
    return list(tokenizer_of(model).encode(text, add_special_tokens=False))


def decode(ids: Iterable[Sequence[int]], model: Any) -> list[str]:
    """Text of each sequence of ids, exactly as the tokenizer decodes it: for display."""
    tokenizer = tokenizer_of(model)
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (16 digits) of the vocabulary: token strings with their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def vocabulary_size(model: Any) -> int:
    """Size of the model's unembedding, or of the tokenizer where that is given."""
    cfg = getattr(model, "cfg", None)
    return int(cfg.d_vocab) if cfg is not None else len(tokenizer_of(model))
