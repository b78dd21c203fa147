"""How often each token occurs in a corpus: the measure of a token's rarity.

Tables belong to one tokenizer and say so by its hash; a table of another tokenizer is refused,
because the same id would mean another token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.checks import InputError
from memcircuits.paragraphs import encode, tokenizer_of
from memcircuits.results import read_safetensors, write_atomically

SCHEMA = "memcircuits.unigrams/1"


@dataclass(frozen=True, eq=False)
class UnigramTable:
    """Token counts of a corpus.

    Attributes:
        counts: occurrences of each token id.
        source: what was counted.
        tokenizer: hash of the tokenizer's vocabulary, or "" where only ids were known.
    """

    counts: Int[Tensor, " d_vocab"]
    source: str
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or self.counts.is_floating_point() or not len(self.counts):
            raise InputError("counts", tuple(self.counts.shape), "give integer counts [d_vocab]")
        if int(self.counts.min()) < 0:
            raise InputError("counts", int(self.counts.min()), "counts cannot be negative")

    @property
    def n_tokens(self) -> int:
        """Tokens counted."""
        return int(self.counts.sum())

    @property
    def log_prob(self) -> Float[Tensor, " d_vocab"]:
        """Log-probability of each token, nats, add-one smoothed so that unseen ones are finite."""
        smoothed = (self.counts + 1).double()
        return (smoothed / smoothed.sum()).log().float()

    @classmethod
    def from_tokens(
        cls, ids: Tensor | Iterable[Iterable[int]], d_vocab: int, *, source: str = "given tokens"
    ) -> UnigramTable:
        """Count token ids; `d_vocab` is the size of the model's vocabulary.

        Raises:
            InputError: if an id lies outside the vocabulary.
        """
        counts = torch.zeros(d_vocab, dtype=torch.long)
        for row in [ids] if isinstance(ids, Tensor) else ids:
            flat = torch.as_tensor(row, dtype=torch.long).flatten().cpu()
            if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < d_vocab:
                raise InputError("ids", int(flat.max()), f"ids must lie in [0, {d_vocab})")
            counts += torch.bincount(flat, minlength=d_vocab)
        return cls(counts, source)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], model: Any, *, source: str = "given texts"
    ) -> UnigramTable:
        """Encode and count texts; they may be a generator and are read once."""
        tokenizer = tokenizer_of(model)
        counted = cls.from_tokens(
            (encode(text, tokenizer) for text in texts), vocabulary_size(model), source=source
        )
        return cls(counted.counts, source, tokenizer_hash(tokenizer))

    @classmethod
    def shipped(cls) -> UnigramTable:
        """Counts of the shipped organism's training tokens."""
        from memcircuits.organism import DATA

        return cls.read(DATA / "unigrams.safetensors")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> UnigramTable:
        """Read a saved table.

        Raises:
            InputError: if the file is missing, damaged or no unigram table.
        """
        tensors, header = read_safetensors(path)
        if header.get("schema") != SCHEMA or "counts" not in tensors:
            raise InputError("unigrams", Path(path).name, f"it is no table of schema {SCHEMA}")
        return cls(tensors["counts"], header.get("source", ""), header.get("tokenizer", ""))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as safetensors, atomically."""
        from safetensors.torch import save

        header = {
            "schema": SCHEMA,
            "source": self.source,
            "tokenizer": self.tokenizer,
            "n_tokens": str(self.n_tokens),
        }
        return write_atomically(path, save({"counts": self.counts.contiguous()}, metadata=header))

    def check(self, model: Any) -> None:
        """Raise `InputError` unless the table belongs to the model's tokenizer."""
        size = vocabulary_size(model)
        if len(self.counts) != size:
            raise InputError(
                "unigrams",
                f"{len(self.counts)} tokens",
                f"the model has {size}; count the corpus with the model's tokenizer",
            )
        tokenizer = getattr(model, "tokenizer", None)
        if self.tokenizer and tokenizer is not None:
            own = tokenizer_hash(tokenizer)
            if own != self.tokenizer:
                raise InputError(
                    "unigrams",
                    f"made with tokenizer {self.tokenizer}",
                    f"the model's is {own}; count the corpus with the model's tokenizer",
                )

    def __repr__(self) -> str:
        return f"UnigramTable({len(self.counts)} ids, {self.n_tokens:,} tokens of {self.source})"


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (16 digits) of the vocabulary: token strings with their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def vocabulary_size(model: Any) -> int:
    """Size of the model's unembedding, or of the tokenizer where that is given."""
    cfg = getattr(model, "cfg", None)
    return int(cfg.d_vocab) if cfg is not None else len(tokenizer_of(model))
