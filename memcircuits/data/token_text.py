"""What tokens look like: one label for each token of a row, and the text of a row.

A token need not be text. Tokenizers that work on bytes (byte-level BPE, and SentencePiece where a
character is not in its vocabulary) cut characters into tokens: the three bytes of 日 may be two
tokens, and neither is a character. Decoded by itself, each would be the replacement character
U+FFFD, so that different tokens look alike. Here

* the bytes that are no whole character are written out, `⟨E6 97⟩`;
* where a tokenizer does not tell the bytes of its tokens, each of them shows the character that
  they share and its place among them, `⟨日 1/2⟩`;
* the replacement character itself, if it stands in the text, is written as its bytes too.

The bytes of a token are read from its name in the vocabulary, and believed only if they decode to
what the tokenizer decodes. The labels of a row keep the spaces that words begin with, also those
that SentencePiece drops when it decodes one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcircuits.data.token_bytes import BYTE_OF_CHARACTER, BYTE_TOKEN
from memcircuits.data.tokens import TokenizerLike, tokenizer_of
from memcircuits.display.text import text_of_bytes

REPLACEMENT = "\ufffd"

MAX_SHARING = 8
"""Maximum number of tokens that are searched for the character that they share."""

_WORD_START = "\u2581"  # what SentencePiece writes for a space


def token_labels(ids: Sequence[int], model: TokenizerLike | None) -> list[str]:
    """The text of each token of a row, never with the replacement character.

    Args:
        ids: token ids of the row.
        model: tokenizer, or a model that has one.

    Raises:
        InputError: if there is no tokenizer.

    Example:
        >>> token_labels(model.tokenizer.encode(" No one"), model)
        [' No', ' one']
    """
    tokenizer = tokenizer_of(model)
    labels = []
    for place, token_id in enumerate(ids):
        raw = token_bytes(token_id, tokenizer)
        labels.append(_shared(ids, place, tokenizer) if raw is None else text_of_bytes(raw))
    return labels


def row_text(ids: Sequence[int], model: TokenizerLike | None) -> str:
    """The text of a row as it decodes; bytes that its ends cut from a character are written out.

    Raises:
        InputError: if there is no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    text = _decode(ids, tokenizer)
    if REPLACEMENT not in text:
        return text
    raw = [token_bytes(token_id, tokenizer) for token_id in ids]
    known = [each for each in raw if each is not None]
    if len(known) < len(raw):
        return text.replace(REPLACEMENT, text_of_bytes(REPLACEMENT.encode()))
    joined = text_of_bytes(b"".join(known))
    return joined if text.startswith(" ") else joined.removeprefix(" ")


def token_bytes(token_id: int, tokenizer: Any) -> bytes | None:
    """The bytes of a token; None if the tokenizer does not tell them."""
    text = _decode([token_id], tokenizer)
    name = _name(token_id, tokenizer)
    if REPLACEMENT not in text:
        # SentencePiece drops the space before the first word that it decodes.
        spaced = name.replace(_WORD_START, " ")
        return (spaced if spaced == f" {text}" else text).encode()
    byte_token = BYTE_TOKEN.fullmatch(name)
    candidates = [
        bytes.fromhex(byte_token[1]) if byte_token else None,
        _bytes_of_name(name),
        name.replace(_WORD_START, " ").encode("utf-8", "surrogatepass"),
    ]
    for raw in candidates:
        if raw is not None and raw.decode("utf-8", "replace") == text:
            return raw
    return None


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _name(token_id: int, tokenizer: Any) -> str:
    """What the vocabulary calls a token; empty if the tokenizer does not tell."""
    names = getattr(tokenizer, "convert_ids_to_tokens", None)
    name = None if names is None else names(int(token_id))
    return name if isinstance(name, str) else ""


def _shared(ids: Sequence[int], place: int, tokenizer: Any) -> str:
    """The character that the token shares with its neighbours, and its place among them."""
    for length in range(2, MAX_SHARING + 1):
        for start in range(max(0, place - length + 1), place + 1):
            text = _decode(ids[start : start + length], tokenizer)
            if len(ids[start : start + length]) == length and REPLACEMENT not in text:
                return f"⟨{text.strip()} {place - start + 1}/{length}⟩"
    return f"⟨token {ids[place]}⟩"


def _bytes_of_name(name: str) -> bytes | None:
    """The bytes that byte-level BPE writes as these characters; None if it writes none so."""
    if not all(character in BYTE_OF_CHARACTER for character in name):
        return None
    return bytes(BYTE_OF_CHARACTER[character] for character in name)
