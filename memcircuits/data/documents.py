"""Whole documents: one text of any length, its tokens, and the characters of every token.

A document is encoded once, as a whole, and never decoded: what is shown is the text as it was read,
and the tokenizer's offsets say which of its characters a token is made of. Two things keep this
exact. A tokenizer may leave the space before a word out of the word's offsets; here a token begins
where the one before it ends. And a token may be part of a character (bytes of an emoji); then all
tokens of the character share it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.formats.records import Unusable, decode_utf8, printable
from memcircuits.data.normalizing import Normalize, check_normalize, normalized
from memcircuits.data.tokens import TokenizerLike, tokenizer_of


@dataclass(frozen=True)
class Document:
    """A text with its tokens.

    Attributes:
        name: name of the file, without its folder; `text` for a text that was given as such.
        text: the text.
        ids: token ids, [token].
        starts: for each token, the place of its first character in the text, [token].
        ends: for each token, the place behind its last character, [token].
        changes: kind of character -> how often it was normalised.
    """

    name: str
    text: str
    ids: Int[Tensor, " token"]
    starts: Int[Tensor, " token"]
    ends: Int[Tensor, " token"]
    changes: Mapping[str, int] = field(default_factory=dict)


def read_document(
    text_or_file: str | os.PathLike[str], model: TokenizerLike, *, normalize: Normalize = "auto"
) -> Document:
    """Read and encode one document.

    Args:
        text_or_file: a text, or the path of a UTF-8 text file of any kind. A string of one line
            that names an existing file is a path.
        model: model or tokenizer.
        normalize: as in `Paragraphs.from_texts`; characters are counted in the normalised text.

    Raises:
        InputError: if the file cannot be read, the text is empty, or the tokenizer does not tell
            the characters of its tokens.
    """
    check_normalize(normalize)
    name, text = _name_and_text(text_or_file)
    text, changes = normalized(text) if normalize == "auto" else (text, {})
    if not text:
        raise InputError("text_or_file", name, "it is empty")
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "model",
            type(tokenizer).__name__,
            "this tokenizer does not tell which characters a token has; load one that has a "
            "tokenizer.json",
        )
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.long).reshape(-1, 2)
    ends = offsets[:, 1].cummax(0).values
    starts = torch.minimum(torch.cat([torch.zeros(1, dtype=torch.long), ends])[:-1], offsets[:, 0])
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    return Document(name, text, ids, starts, ends, changes)


def _name_and_text(text_or_file: str | os.PathLike[str]) -> tuple[str, str]:
    """The name of a document, and its text as it is written."""
    if isinstance(text_or_file, str) and not _names_a_file(text_or_file):
        if printable(text_or_file) != text_or_file:
            raise InputError("text_or_file", "halves of surrogate pairs", "give UTF-8 text")
        return "text", text_or_file
    path = Path(text_or_file)
    if path.is_dir():
        raise InputError("text_or_file", path.name, "it is a folder; give one text file")
    try:
        text = decode_utf8(path.read_bytes())
    except FileNotFoundError:
        raise InputError("text_or_file", path.name, "there is no such file") from None
    except Unusable as problem:  # which says what to do
        raise InputError("text_or_file", path.name, str(problem)) from None
    except OSError as problem:
        raise InputError("text_or_file", path.name, f"{problem}; give a UTF-8 text file") from None
    return path.name, text


def _names_a_file(text: str) -> bool:
    try:
        return bool(text) and "\n" not in text and Path(text).exists()
    except (OSError, ValueError):  # longer than a name can be, or with a NUL
        return False
