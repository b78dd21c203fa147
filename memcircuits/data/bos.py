"""Tokens in front of a text: which ones a model's own tokenizer puts there.

Many models were trained with a beginning-of-sequence token (BOS) in front of every text, and read a
text without it badly: Gemma 3 270M predicts the Lord's Prayer at 3.08 nats/token without BOS and at
0.35 behind it (`tests/models/test_gemma3.py`). Nothing in a model says which tokens these are as
reliably as what its tokenizer does by default: GPT-2, GPT-Neo and Pythia put nothing in front,
Llama and Gemma their BOS, OPT `</s>`.

TransformerLens hides this default: it reads a tokenizer again with `add_bos_token=True`, whatever
the model. `default_bos` therefore asks the tokenizer's own files where that may have happened.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from memcircuits.base.errors import InputError
from memcircuits.data.tokens import TokenizerLike, tokenizer_of

Bos: TypeAlias = Literal["auto"] | bool
"""What to put in front of text: what the tokenizer does by default, its BOS, or nothing."""

_SAMPLES = ("The cat sat on the mat.", "1 + 2", "a")


def check_bos(bos: Bos) -> None:
    """Raise `InputError` unless `bos` is `"auto"`, True or False."""
    if bos is not True and bos is not False and bos != "auto":
        raise InputError("bos", repr(bos), 'choose one of "auto", True and False')


def bos_ids(model: TokenizerLike | None, bos: Bos) -> tuple[int, ...]:
    """Ids of the tokens in front of text.

    Args:
        model: a model or its tokenizer; without one, `"auto"` puts nothing in front.
        bos: `"auto"` for what the tokenizer puts in front by default; True for the same or, where
            that is nothing, the tokenizer's BOS; False for nothing.

    Raises:
        InputError: for another value, or if True is asked of a tokenizer that has no BOS.
    """
    check_bos(bos)
    if bos is False:
        return ()
    has_tokenizer = hasattr(model, "encode") or getattr(model, "tokenizer", None) is not None
    front = default_bos(model) if has_tokenizer and model is not None else ()
    if front or bos == "auto":
        return front
    token = getattr(tokenizer_of(model), "bos_token_id", None)
    if token is None:
        raise InputError("bos", True, "the tokenizer has no BOS token; use bos=False")
    return (int(token),)


def default_bos(model: TokenizerLike) -> tuple[int, ...]:
    """Ids of the tokens that a model's own tokenizer puts in front of a text by default."""
    tokenizer = tokenizer_of(model)
    front = _tokens_in_front(tokenizer)
    settings = getattr(tokenizer, "init_kwargs", {})
    if front and settings.get("add_bos_token") and "gguf_file" not in settings:
        own = _default_bos_of_files(str(getattr(tokenizer, "name_or_path", "")))
        return front if own is None else own
    return front


def without_bos(ids: Sequence[int], bos: tuple[int, ...]) -> list[int]:
    """The ids without the tokens in front, where they begin with them already."""
    begins = bool(bos) and tuple(ids[: len(bos)]) == bos
    return list(ids[len(bos) :]) if begins else list(ids)


def _tokens_in_front(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts in front of every sample; tokens behind a text do not count."""
    fronts = {_front_of(tokenizer, text) for text in _SAMPLES}
    return fronts.pop() if len(fronts) == 1 else ()


def _front_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    # Not by `encode`, which refuses tokenizers that read text wrongly: ids may be given.
    bare = list(tokenizer.encode(text, add_special_tokens=False))
    full = list(tokenizer.encode(text))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    # Some tokenizers split a text otherwise behind BOS: the special tokens that it begins with.
    special = set(getattr(tokenizer, "all_special_ids", ()))
    n_special = next((i for i, token in enumerate(full) if token not in special), 0)
    return tuple(full[:n_special])


@functools.lru_cache(maxsize=16)
def _default_bos_of_files(name_or_path: str) -> tuple[int, ...] | None:
    """What the tokenizer puts in front as its files describe it; None if there are none here."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except Exception:  # any folder may stand there, and every reader has errors of its own
        return None
    return _tokens_in_front(tokenizer)
