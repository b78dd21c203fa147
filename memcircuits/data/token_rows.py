"""What follows from rows of token ids, the place of the split, and the tokens in front.

The base of `Paragraphs`: the place where ids become what a model reads (`inputs`).
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.token_text import row_text, token_labels
from memcircuits.data.tokens import TokenizerLike


class TokenRows:
    """Rows of token ids with a prefix and a continuation each.

    Attributes:
        ids: token ids, [paragraph, pos].
        n_prefix: number of tokens of the prefix.
        bos: ids of the tokens that the model reads in front of every row.
        as_written: ids of the texts as they are written; None where normalising changed none.
    """

    ids: Int[Tensor, "paragraph pos"]
    n_prefix: int
    bos: tuple[int, ...]
    as_written: Int[Tensor, "paragraph pos"] | None

    @property
    def n_continuation(self) -> int:
        """Number of continuation tokens."""
        return self.ids.shape[1] - self.n_prefix

    @property
    def prefix(self) -> Int[Tensor, "paragraph pos"]:
        """Ids of the prefixes."""
        return self.ids[:, : self.n_prefix]

    @property
    def continuation(self) -> Int[Tensor, "paragraph pos"]:
        """Ids of the continuations."""
        return self.ids[:, self.n_prefix :]

    @property
    def n_bos(self) -> int:
        """Number of tokens in front of every paragraph."""
        return len(self.bos)

    @property
    def n_given(self) -> int:
        """Number of tokens that the model reads before the continuation: those in front too."""
        return self.n_bos + self.n_prefix

    @cached_property
    def inputs(self) -> Int[Tensor, "paragraph bos_and_pos"]:
        """Ids that the model reads: the tokens in front, then the paragraph."""
        if not self.bos:
            return self.ids
        with torch.inference_mode(False):
            return torch.cat([torch.tensor(self.bos).expand(len(self), -1), self.ids], 1)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (16 digits) of the ids, the place of the split and the tokens in front."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)}/{self.n_prefix}".encode())
        if self.bos:
            digest.update(f"/{self.bos}".encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.ids)

    def check_same_lengths(self, other: TokenRows, argument: str = "paragraphs") -> None:
        """Raise `InputError` unless both sets have as many prefix and continuation tokens."""
        lengths, others = [(rows.n_prefix, rows.n_continuation) for rows in (self, other)]
        if lengths != others:
            raise InputError(
                argument,
                f"{lengths[0]} + {lengths[1]} and {others[0]} + {others[1]} tokens",
                "both sets need the same lengths",
            )

    def check_same_bos(self, other: TokenRows, argument: str = "paragraphs") -> None:
        """Raise `InputError` unless the model reads both sets behind the same tokens."""
        if self.bos != other.bos:
            raise InputError(
                argument,
                f"behind {other.bos or 'no token'}, the others behind {self.bos or 'no token'}",
                "compare paragraphs with the same tokens in front: give both the same bos",
            )

    def texts(self, model: TokenizerLike) -> list[str]:
        """The decoded paragraphs, for display (`memcircuits.data.token_text`)."""
        return [row_text(row, model) for row in self.ids.tolist()]

    def tokens(self, model: TokenizerLike, index: int = 0) -> list[str]:
        """Each token of one paragraph as text, for display (`memcircuits.data.token_text`)."""
        return token_labels(self.ids[index].tolist(), model)


def joined_as_written(*sets: TokenRows) -> Int[Tensor, "paragraph pos"] | None:
    """Ids of all sets as they are written, one below the other; None if none differs."""
    if all(rows.as_written is None for rows in sets):
        return None
    return torch.cat([rows.ids if rows.as_written is None else rows.as_written for rows in sets])
