"""Paragraphs as token ids: a prefix that is given and a continuation that may be recited.

The ids are the truth. Text is encoded once, without special tokens, and sliced; it is decoded only
to be shown, because decoding and encoding again does not always give the same ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, one_of
from memcircuits.data.formats.records import EMPTY, BadRow, Row
from memcircuits.data.formats.sources import find_sources, read_rows
from memcircuits.data.tokens import decode, encode
from memcircuits.data.windows import Windows, cut

if TYPE_CHECKING:
    import pandas as pd


def read_paragraphs(
    path: str | os.PathLike[str], model: Any = None, *, n_prefix: int = 50, n_continuation: int = 50
) -> Paragraphs:
    """Read the first window of every row of a file, folder or dataset.

    Args:
        path: see the table above.
        model: model or tokenizer, needed where there is text.
        n_prefix: tokens of the prefix.
        n_continuation: tokens of the continuation; longer rows are cut.

    Raises:
        InputError: if the file is missing, of an unknown format, damaged, empty, or has rows that
            are too short.
    """
    sources = find_sources(path)
    rows: list[Row] = []
    for source in sources:
        found = read_rows(source)
        rows += [_strict(r) for r in found if not (isinstance(r, BadRow) and r.reason == EMPTY)]
    if not rows:
        raise InputError("paragraphs", f"{sources[0].name} is empty", "give at least one paragraph")
    windows = cut(rows, model, Windows(n_prefix, n_continuation))
    for bad in windows.bad:
        _strict(bad)
    metadata = {key: tuple(row.metadata.get(key) for row in rows) for key in rows[0].metadata}
    return Paragraphs(windows.ids, n_prefix, tuple(row.name for row in rows), metadata)


def _strict(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise InputError("paragraphs", row.where, row.reason)
    return row


@dataclass(frozen=True, eq=False)
class Paragraphs:
    """A set of paragraphs of equal length.

    Attributes:
        ids: token ids, [paragraph, pos].
        n_prefix: how many of the tokens are the prefix.
        names: a unique name for each paragraph.
        metadata: further columns, one value per paragraph (source, repetitions, ...).
    """

    ids: Int[Tensor, "paragraph pos"]
    n_prefix: int = 50
    names: tuple[str, ...] = ()
    metadata: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.ids
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError("ids", shape, "give an integer tensor [paragraph, pos]")
        if ids.dtype == torch.bool:
            raise InputError("ids", "bool", "give an integer tensor [paragraph, pos]")
        if not len(ids):
            raise InputError("paragraphs", "none", "give at least one paragraph")
        at_least("n_prefix", self.n_prefix, 1)
        if ids.shape[1] <= self.n_prefix:
            raise InputError(
                "paragraphs",
                f"{ids.shape[1]} tokens each",
                f"they must be longer than n_prefix={self.n_prefix}; "
                "use longer texts or a smaller n_prefix",
            )
        if int(ids.min()) < 0:
            raise InputError("ids", int(ids.min()), "token ids cannot be negative")
        object.__setattr__(self, "ids", ids.detach().to("cpu", torch.long))
        names = tuple(self.names) or tuple(f"paragraph-{i:04d}" for i in range(len(ids)))
        for column, values in {"names": names, **self.metadata}.items():
            if len(values) != len(ids):
                raise InputError(column, f"{len(values)} values", f"give {len(ids)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "metadata", {k: tuple(v) for k, v in self.metadata.items()})

    # -- making them ----------------------------------------------------------------------------

    @classmethod
    def from_tokens(
        cls,
        ids: Int[Tensor, "paragraph pos"] | Sequence[Sequence[int]],
        *,
        n_prefix: int = 50,
        names: Sequence[str] = (),
    ) -> Paragraphs:
        """Paragraphs from token ids; everything after the first `n_prefix` is the continuation.

        Raises:
            InputError: if the rows differ in length, are empty or too short.

        Example:
            >>> mc.Paragraphs.from_tokens([[5, 7, 5, 9], [1, 2, 3, 4]], n_prefix=3)
            Paragraphs(2 x 3 + 1 tokens)
        """
        if not len(ids):
            raise InputError("ids", "empty", "give at least one paragraph")
        if not isinstance(ids, Tensor) and not all(hasattr(row, "__len__") for row in ids):
            raise InputError("ids", repr(ids)[:60], "give rows of token ids")
        if not isinstance(ids, Tensor):
            lengths = {len(row) for row in ids}
            if len(lengths) > 1:
                raise InputError(
                    "ids", f"rows of {sorted(lengths)[:5]} tokens", "all rows must be equally long"
                )
            whole = all(type(i) is int and 0 <= i < 2**31 for row in ids for i in row)
            if not whole:
                raise InputError("ids", repr(ids)[:60], "rows must hold token ids")
            ids = torch.tensor([list(row) for row in ids], dtype=torch.long).reshape(
                len(ids), *lengths
            )
        return cls(ids, n_prefix, tuple(names))

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        model: Any,
        *,
        n_prefix: int = 50,
        n_continuation: int = 50,
        names: Sequence[str] = (),
    ) -> Paragraphs:
        """Encode each text once, without special tokens, and keep its first tokens.

        Args:
            texts: one paragraph each.
            model: model (or tokenizer) that defines the token ids.
            n_prefix: tokens of the prefix.
            n_continuation: tokens of the continuation.
            names: a name for each.

        Raises:
            InputError: if there is no text, or one is shorter than `n_prefix + n_continuation`.

        Example:
            >>> text = "We hold these truths to be self-evident, that all men are created equal"
            >>> mc.Paragraphs.from_texts([text], model, n_prefix=8, n_continuation=6)
            Paragraphs(1 x 8 + 6 tokens)
        """
        if isinstance(texts, str):
            raise InputError("texts", texts, "give a list of strings, one per paragraph")
        texts = list(texts)
        if not texts:
            raise InputError("texts", "empty", "give at least one paragraph")
        at_least("n_prefix", n_prefix, 1)
        at_least("n_continuation", n_continuation, 1)
        length = n_prefix + n_continuation
        rows = [encode(text, model) for text in texts]
        short = [i for i, row in enumerate(rows) if len(row) < length]
        if short:
            raise InputError(
                "texts",
                f"text {short[0]} has {len(rows[short[0]])} tokens ({len(short)} are too short)",
                f"each needs n_prefix + n_continuation = {length}; "
                "give longer texts or smaller lengths",
            )
        ids = torch.tensor([row[:length] for row in rows], dtype=torch.long)
        return cls(ids, n_prefix, tuple(names))

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        model: Any = None,
        *,
        n_prefix: int = 50,
        n_continuation: int = 50,
    ) -> Paragraphs:
        """Read a file; see `memcircuits.data.windows` for the formats."""
        from memcircuits.data.paragraphs import read_paragraphs

        return read_paragraphs(path, model, n_prefix=n_prefix, n_continuation=n_continuation)

    @classmethod
    def shipped(cls, role: str = "all") -> Paragraphs:
        """The paragraphs planted in the shipped organism, and controls it never saw.

        Args:
            role: `planted`, `control` or `all`.
        """
        from memcircuits.organism import DATA

        one_of("role", role, ("planted", "control", "all"))
        paragraphs = cls.read(DATA / "paragraphs.jsonl")
        if role == "all":
            return paragraphs
        return paragraphs[[i for i, r in enumerate(paragraphs.metadata["role"]) if r == role]]

    @classmethod
    def of(cls, value: Any, model: Any, argument: str = "paragraphs") -> Paragraphs:
        """What the public functions accept: `Paragraphs`, a list of strings, or ids."""
        if isinstance(value, Paragraphs):
            return value
        if isinstance(value, Tensor):
            return cls.from_tokens(value)
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return cls.from_texts(value, model)
        if isinstance(value, (list, tuple)):
            return cls.from_tokens(value)
        raise InputError(
            argument, type(value).__name__, "give Paragraphs, a list of strings or a LongTensor"
        )

    # -- using them -----------------------------------------------------------------------------

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

    @cached_property
    def hash(self) -> str:
        """SHA-256 (16 digits) of the ids and the place of the split."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)}/{self.n_prefix}".encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Paragraphs]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Paragraphs: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Paragraphs: ...
    def __getitem__(self, index: Any) -> Paragraphs:
        """A subset, always as `Paragraphs`; takes an index, slice, list or boolean mask."""
        rows = torch.arange(len(self))[index].reshape(-1)
        chosen = rows.tolist()
        return Paragraphs(
            self.ids[rows],
            self.n_prefix,
            tuple(self.names[i] for i in chosen),
            {key: tuple(values[i] for i in chosen) for key, values in self.metadata.items()},
        )

    def __add__(self, other: Paragraphs) -> Paragraphs:
        """Both sets in one; they must agree in lengths. Metadata that only one has are dropped."""
        if (self.n_prefix, self.ids.shape[1]) != (other.n_prefix, other.ids.shape[1]):
            raise InputError(
                "paragraphs",
                f"{self.n_prefix} + {self.n_continuation} and "
                f"{other.n_prefix} + {other.n_continuation} tokens",
                "both sets need the same lengths",
            )
        return Paragraphs(
            torch.cat([self.ids, other.ids]),
            self.n_prefix,
            self.names + other.names,
            {k: self.metadata[k] + other.metadata[k] for k in self.metadata if k in other.metadata},
        )

    def texts(self, model: Any) -> list[str]:
        """The decoded paragraphs, for display."""
        return decode(self.ids.tolist(), model)

    def tokens(self, model: Any, index: int = 0) -> list[str]:
        """Each token of one paragraph as text, for display."""
        return decode(self.ids[index].unsqueeze(-1).tolist(), model)

    def to_frame(self) -> pd.DataFrame:
        """Columns `id`, every fact, and the ids as lists."""
        import pandas as pd

        return pd.DataFrame({"id": self.names, **self.metadata, "ids": self.ids.tolist()})

    def __repr__(self) -> str:
        return f"Paragraphs({len(self)} x {self.n_prefix} + {self.n_continuation} tokens)"


def refuse_overlap(memorized: Paragraphs, control: Paragraphs, argument: str = "control") -> None:
    """Raise `InputError` if a control has the token ids of a memorized paragraph's prefix."""
    known = set(map(tuple, memorized.prefix.tolist()))
    shared = sum(tuple(row) in known for row in control.prefix.tolist())
    if shared:
        raise InputError(
            argument,
            f"{shared} of its paragraphs have the prefix of a memorized one",
            "controls must be other paragraphs",
        )


ParagraphsLike: TypeAlias = Paragraphs | Sequence[str] | Tensor | Sequence[Sequence[int]]
"""What the public functions take: `Paragraphs`, texts, or token ids [paragraph, pos]."""
