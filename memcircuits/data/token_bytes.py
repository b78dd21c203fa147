"""The bytes that tokens stand for, and the tokens that can spell given bytes.

A prefix that is cut at any byte ends inside a token. To continue it as the model would have read
it, one asks which tokens *begin with* some bytes, and which tokens those bytes begin with. The
tokens are sorted by their bytes, so that both questions are binary searches: a trie flattened into
a list.

Tokenizers store bytes in three ways, told apart by their decoders: byte-level BPE (GPT-2) writes
each byte as a printable character; SentencePiece (Llama) writes spaces as U+2581 and single bytes
as `<0x0A>`; for all others the bytes of a token are what it adds to the text of another token.
Whether the table is right is not assumed: `TokenBytes.text_of` compares it with the tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from memcircuits.data.tokens import TokenizerLike, encode, tokenizer_of

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece names the token of one byte."""

_LARGER_THAN_ALL = b"\xff" * 8  # no UTF-8 text holds this byte


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token of a tokenizer.

    Attributes:
        tokenizer: the tokenizer.
        of_id: token id -> its bytes.
        special: ids that are no text, such as the end of a document.
    """

    tokenizer: Any
    of_id: tuple[bytes, ...]
    special: frozenset[int]

    @classmethod
    def of(cls, model: TokenizerLike) -> TokenBytes:
        """The table of a model's tokenizer, or of a tokenizer.

        Raises:
            InputError: if the model has no tokenizer.
        """
        tokenizer = tokenizer_of(model)
        return cls(tokenizer, tuple(_bytes_of_tokens(tokenizer)), _special_ids(tokenizer))

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        """The bytes of all tokens that are text, ascending, and their ids."""
        pairs = sorted(
            (token, i) for i, token in enumerate(self.of_id) if token and i not in self.special
        )
        return [token for token, _ in pairs], [i for _, i in pairs]

    @cached_property
    def ids_in_order(self) -> list[int]:
        """Ids of the tokens that are text, in the order of their bytes."""
        return self._sorted[1]

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Token id -> its place in `ids_in_order`."""
        return {token: place for place, token in enumerate(self.ids_in_order)}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; beyond the vocabulary (padded embeddings), a byte of no text."""
        return self.of_id[token] if token < len(self.of_id) else _LARGER_THAN_ALL[:1]

    def beginning_with(self, part: bytes) -> slice:
        """Where in `ids_in_order` the tokens lie whose bytes begin with `part`."""
        tokens = self._sorted[0]
        return slice(bisect_left(tokens, part), bisect_left(tokens, part + _LARGER_THAN_ALL))

    def within(self, text: bytes) -> list[int]:
        """Ids of the tokens that `text` begins with, the shortest first."""
        tokens, ids = self._sorted
        inside = []
        for length in range(1, min(len(text), self._longest) + 1):
            place = bisect_left(tokens, text[:length])
            while place < len(tokens) and tokens[place] == text[:length]:
                inside.append(ids[place])
                place += 1
        return inside

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._sorted[0]), default=0)

    def spelled(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token of a text; SentencePiece shows no space before the first word."""
        tokens = [self.of_id[i] for i in ids]
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokens and tokens[0].startswith(b" ") and not text.startswith(" "):
            tokens[0] = tokens[0][1:]
        return tokens

    def text_of(self, ids: Sequence[int]) -> bytes | None:
        """The text of some tokens; None unless it is encoded as these tokens again."""
        text = b"".join(self.spelled(ids))
        try:
            return text if encode(text.decode("utf-8"), self.tokenizer) == list(ids) else None
        except UnicodeDecodeError:
            return None

    def begins_word(self, tokens: Sequence[bytes], index: int) -> bool:
        """Whether the token at `index` of a text begins a word: it begins with white space."""
        return index == 0 or tokens[index][:1].isspace() or tokens[index - 1][-1:] == b"\n"


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


def _bytes_of_tokens(tokenizer: Any) -> list[bytes]:
    """The bytes of every id, by the kind of the tokenizer."""
    n_tokens = len(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(n_tokens)))
    decoder = _decoder(tokenizer)
    if "ByteLevel" in decoder:
        convert = _byte_level
    elif "Metaspace" in decoder or "ByteFallback" in decoder:
        convert = _sentence_piece
    else:
        return _added_to_another(tokenizer, n_tokens)
    literal = {i: str(t) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return [
        literal[i].encode() if i in literal else convert(token or "")
        for i, token in enumerate(tokens)
    ]


def _decoder(tokenizer: Any) -> str:
    """How a tokenizer of Hugging Face turns tokens into text, or nothing."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return "" if decoder is None else repr(decoder)


def _byte_level(token: str) -> bytes:
    """GPT-2 writes bytes that are no visible characters as those from U+0100 on."""
    return bytes(BYTE_OF_CHARACTER[c] for c in token if c in BYTE_OF_CHARACTER)


def _sentence_piece(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _added_to_another(tokenizer: Any, n_tokens: int) -> list[bytes]:
    """What each token adds to the text of the last one, which stands before it."""
    before = n_tokens - 1
    alone = tokenizer.decode([before], clean_up_tokenization_spaces=False)
    pairs = [[before, i] for i in range(n_tokens)]
    texts = [tokenizer.decode(pair, clean_up_tokenization_spaces=False) for pair in pairs]
    return [text.removeprefix(alone).encode("utf-8", "replace") for text in texts]


def _characters_of_bytes() -> dict[str, int]:
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _characters_of_bytes()
"""GPT-2's alphabet: the visible character that byte-level BPE writes -> its byte."""
