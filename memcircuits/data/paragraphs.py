"""Paragraphs as token ids: a prefix that is given and a continuation that may be recited.

Measurements are of the ids. Text is encoded once, without special tokens, and sliced; it is decoded
only to be shown, because decoding and encoding again does not always give the same ids.

A model that was trained behind a beginning-of-sequence token (BOS) has to read it in front of every
paragraph. Such tokens are kept beside the ids, in `bos`. `inputs` is what a model reads, `ids` what
is measured: positions, `n_prefix`, EM and NLL never count the tokens in front.

`Paragraphs` is what all analyses take. It is made `from_tokens`, `from_texts`, by `read` from a
file, or as the `shipped` set; a subset of it is `Paragraphs` again, one paragraph too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.data.bos import Bos, bos_ids
from memcircuits.data.draws import sample_rows
from memcircuits.data.formats.records import Columns, ColumnsLike
from memcircuits.data.formats.text import Txt
from memcircuits.data.groups import GROUP_COLUMN, find_groups
from memcircuits.data.metadata import in_both, unique_names
from memcircuits.data.normalizing import Normalize
from memcircuits.data.reading import read_file, read_texts
from memcircuits.data.token_ids import check_bos_ids, ids_from_rows, plain_ids
from memcircuits.data.token_rows import TokenRows, joined_as_written
from memcircuits.data.tokens import TokenizerLike
from memcircuits.data.windows import Windows
from memcircuits.display.html_table import table_html

if TYPE_CHECKING:
    import pandas as pd

Role = Literal["planted", "control", "both", "organism", "twin", "all"]
"""Which of the shipped paragraphs: those inserted into the training of the organism (`both` and
`organism`), those that neither organism nor twin ever saw, those of both, of one alone, or all."""


@dataclass(frozen=True, eq=False)
class Paragraphs(TokenRows):
    """A set of paragraphs of equal length.

    Attributes:
        ids: token ids, [paragraph, pos].
        n_prefix: number of tokens of the prefix.
        names: a unique name for each paragraph; repeated ones get `#2`, `#3` and so on.
        metadata: further columns, one value per paragraph (source, repetitions, ...). The column
            `group` says which paragraphs depend on each other (`groups`).
        bos: ids of the tokens that the model reads in front of every paragraph.
        as_written: token ids of the texts as they are written, [paragraph, pos], where normalising
            changed one; None where it changed none.
        notes: what the reader must know about the files and texts that were read.
        reading_options: arguments of `read` or `from_texts` that decided the tokens, where they are
            not the defaults: `normalize`, `columns`, `align`. Reports repeat them.
    """

    ids: Int[Tensor, "paragraph pos"]
    n_prefix: int = 50
    names: tuple[str, ...] = ()
    metadata: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    bos: tuple[int, ...] = ()
    as_written: Int[Tensor, "paragraph pos"] | None = None
    notes: tuple[str, ...] = ()
    reading_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = plain_ids(self.ids, self.n_prefix)
        n = len(ids)
        names = unique_names(self.names) or tuple(f"paragraph-{i:04d}" for i in range(n))
        for column, values in {"names": names, **self.metadata}.items():
            if len(values) != n:
                raise InputError(column, f"{len(values)} values", f"give {n}")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "bos", check_bos_ids(self.bos))
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "metadata", {k: tuple(v) for k, v in self.metadata.items()})

    @classmethod
    def from_tokens(
        cls,
        ids: Int[Tensor, "paragraph pos"] | Sequence[Sequence[int]],
        *,
        n_prefix: int = 50,
        names: Sequence[str] = (),
        bos: Sequence[int] = (),
    ) -> Paragraphs:
        """Paragraphs from token ids; everything after the first `n_prefix` is the continuation.

        Args:
            ids: token ids, [paragraph, pos].
            n_prefix: tokens of the prefix.
            names: a name for each.
            bos: ids of the tokens that the model reads in front of every paragraph, which `ids`
                leaves out; nothing is put in front by default.

        Raises:
            InputError: if the rows differ in length, are empty or too short.

        Example:
            >>> mc.Paragraphs.from_tokens([[5, 7, 5, 9], [1, 2, 3, 4]], n_prefix=3)
            Paragraphs(2 x 3 + 1 tokens)
        """
        if not len(ids):
            raise InputError("ids", "empty", "give at least one paragraph")
        tensor = ids if isinstance(ids, Tensor) else ids_from_rows(ids)
        return cls(tensor, n_prefix, tuple(names), bos=check_bos_ids(bos))

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str | tuple[str, str]],
        model: TokenizerLike,
        *,
        n_prefix: int = 50,
        n_continuation: int = 50,
        names: Sequence[str] = (),
        align: bool = True,
        normalize: Normalize = "auto",
        bos: Bos = "auto",
    ) -> Paragraphs:
        """Encode each text once, without special tokens, and keep one window of its tokens.

        The window is the first of a text, or that around the border of a pair of texts.

        Args:
            texts: one paragraph each: a text, or a pair of texts, prefix and continuation.
            model: model (or tokenizer) that defines the token ids.
            n_prefix: tokens of the prefix.
            n_continuation: tokens of the continuation.
            names: a name for each.
            align: how pairs are encoded that may have been cut inside a token. True: as one text;
                the continuation begins at the first token that the prefix alone would not have, at
                the cut or a few letters before it (the backtracking of Athiwaratkun et al. 2024,
                arXiv 2403.08688). False: apart, as an audit does that sends the prefix alone; the
                letters around the cut then have other tokens than in the whole text.
            normalize: `"auto"` to undo what copying and saving does to text (line ends,
                non-breaking spaces and others, see `memcircuits.data.normalizing`), `"none"` to
                keep texts as they are written. `Scan` reports what was changed and what it is
                worth.
            bos: tokens that the model reads in front of every text and that are not counted:
                `"auto"` for those that its tokenizer puts there by default, True for its BOS token
                in any case, False for none.

        Raises:
            InputError: if there is no text, one is shorter than `n_prefix + n_continuation`, or is
                neither a string nor a pair of strings.

        Example:
            >>> text = "We hold these truths to be self-evident, that all men are created equal"
            >>> mc.Paragraphs.from_texts([text], model, n_prefix=8, n_continuation=6)
            Paragraphs(1 x 8 + 6 tokens)
            >>> pair = (text[:44], text[44:])  # "... self-evident, tha" and "t all men ..."
            >>> cut = mc.Paragraphs.from_texts([pair], model, n_prefix=6, n_continuation=6)
            >>> cut.tokens(model)[5:7]
            [',', ' that']
        """
        if isinstance(texts, str):
            raise InputError("texts", texts, "give a list of strings, one per paragraph")
        front = bos_ids(model, bos)
        lengths = Windows(n_prefix, n_continuation)
        reading = read_texts(
            texts, model, lengths, names=names, align=align, normalize=normalize, bos=front
        )
        return cls(n_prefix=n_prefix, bos=front, **vars(reading))

    @classmethod
    def read(  # noqa: PLR0913
        cls,
        path: str | os.PathLike[str],
        model: TokenizerLike | None = None,
        *,
        n_prefix: int = 50,
        n_continuation: int = 50,
        stride: int | None = None,
        txt: Txt = "auto",
        columns: ColumnsLike = None,
        normalize: Normalize = "auto",
        bos: Bos = "auto",
        strict: bool = True,
    ) -> Paragraphs:
        """Read windows of every row of a file, folder or dataset.

        Args:
            path: see `memcircuits.data.formats` for the formats.
            model: model or tokenizer, needed where there is text.
            n_prefix: tokens of the prefix.
            n_continuation: tokens of the continuation.
            stride: tokens from one window of a row to the next; by default only the first window
                of a row is read, and `notes` says how many rows go on.
            txt: `"document"` takes a text file as one row, `"paragraph"` each paragraph between
                blank lines; `"auto"` takes the files of a folder as documents, and all files if
                there is a stride.
            columns: the columns that hold the text, where their names do not tell: for instance
                `{"text": "body"}` or `{"prefix": "question", "continuation": "answer"}`.
            normalize: as in `from_texts`.
            bos: tokens that the model reads in front, as in `from_texts`. Rows of token ids that
                begin with them do not get them twice. Without a model nothing is put in front.
            strict: whether a row that is too short or damaged is an error; otherwise it is
                skipped, and `notes` says how many were.

        Raises:
            InputError: if the file is missing, of an unknown format, empty, or has rows that
                cannot be used (if not `strict`: no row that can be used).
        """
        front = bos_ids(model, bos)
        reading = read_file(
            path,
            model,
            Windows(n_prefix, n_continuation, stride),
            columns=Columns.of(columns),
            normalize=normalize,
            bos=front,
            txt=txt,
            strict=strict,
        )
        return cls(n_prefix=n_prefix, bos=front, **vars(reading))

    @classmethod
    def shipped(cls, role: Role = "all") -> Paragraphs:
        """The paragraphs that the shipped organism or its twin was trained on, and controls."""
        from memcircuits.organism import DATA

        one_of("role", role, get_args(Role))
        paragraphs = cls.read(DATA / "paragraphs.jsonl")
        if role == "all":
            return paragraphs
        roles = {"planted": ("both", "organism"), "control": ("neither",)}.get(role, (role,))
        return paragraphs[[i for i, r in enumerate(paragraphs.metadata["role"]) if r in roles]]

    @classmethod
    def of(
        cls,
        value: ParagraphsLike,
        model: TokenizerLike,
        argument: str = "paragraphs",
        *,
        bos: tuple[int, ...] = (),
    ) -> Paragraphs:
        """What the public functions accept: `Paragraphs`, a list of strings, or ids.

        `bos` are the tokens in front of ids; `Paragraphs` and texts have their own.
        """
        if isinstance(value, Paragraphs):
            return value
        if isinstance(value, Tensor):
            return cls.from_tokens(value, bos=bos)
        if not isinstance(value, (list, tuple)):
            raise InputError(
                argument, type(value).__name__, "give Paragraphs, a list of strings or a LongTensor"
            )
        if all(isinstance(v, str) for v in value):
            return cls.from_texts(value, model)
        return cls.from_tokens(value, bos=bos)

    @cached_property
    def groups(self) -> Int[Tensor, " paragraph"]:
        """Number of the independent group that each paragraph belongs to.

        By the column `group`, or else found: copies, near copies and parts of one document
        (`memcircuits.data.groups`). Groups are numbered in the order of their first paragraphs.
        """
        return find_groups(self.ids, self.names, self.metadata)

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
            self.bos,
            None if self.as_written is None else self.as_written[rows],
            reading_options=self.reading_options,
        )

    def __add__(self, other: Paragraphs) -> Paragraphs:
        """Both sets in one, of the same lengths; metadata that only one of them has is dropped."""
        self.check_same_lengths(other)
        self.check_same_bos(other)
        shared = [key for key in self.metadata if key in other.metadata]
        return Paragraphs(
            torch.cat([self.ids, other.ids]),
            self.n_prefix,
            self.names + other.names,
            {key: self.metadata[key] + other.metadata[key] for key in shared},
            self.bos,
            joined_as_written(self, other),
            reading_options=in_both(self.reading_options, other.reading_options),
        )

    def with_ids(
        self, ids: Int[Tensor, "paragraph pos"], n_prefix: int | None = None
    ) -> Paragraphs:
        """Other tokens in place of these, row by row, with the same names, metadata and `bos`.

        What was noted about the texts, and how they were written, is dropped.
        """
        return Paragraphs(ids, n_prefix or self.n_prefix, self.names, self.metadata, self.bos)

    def sample(self, n: int | None, generator: torch.Generator) -> Paragraphs:
        """`n` paragraphs drawn without replacement, in their order; all if there are no more.

        A second paragraph of a group is drawn only when every group has one.
        """
        return self if n is None or len(self) <= n else self[sample_rows(self.groups, n, generator)]

    def to_frame(self) -> pd.DataFrame:
        """Columns `id`, the metadata, `group` (see `groups`) and the ids as lists."""
        import pandas as pd

        columns = dict(self.metadata)
        if GROUP_COLUMN not in columns:
            columns[GROUP_COLUMN] = tuple(self.groups.tolist())
        return pd.DataFrame({"id": self.names, **columns, "ids": self.ids.tolist()})

    def _repr_html_(self) -> str:
        front = f" behind {list(self.bos)}" if self.bos else ""
        about = f"{len(self):,} paragraphs of {self.n_prefix} + {self.n_continuation} tokens{front}"
        frame = self.to_frame()
        frame["ids"] = [", ".join(map(str, ids[:6])) + ", …" for ids in frame["ids"]]
        return table_html(frame, (about, *self.notes))

    def __repr__(self) -> str:
        front = f", bos={self.bos}" if self.bos else ""
        return f"Paragraphs({len(self)} x {self.n_prefix} + {self.n_continuation} tokens{front})"


ParagraphsLike: TypeAlias = Paragraphs | Sequence[str] | Tensor | Sequence[Sequence[int]]
"""What the public functions take: `Paragraphs`, texts, or token ids [paragraph, pos]."""
