"""Unigrams: how often each token occurs in a corpus, the measure of a token's rarity.

A table belongs to one tokenizer, whose hash it carries; a table of another tokenizer is refused,
because the same id would mean another token.

A corpus of any size is counted chunk by chunk (`memcircuits.data.formats.sources`) by the
tokenizer's batch encoder, in one process or several. Each chunk gives a `ChunkCount`, these are
added up, and the sum becomes a `UnigramTable`: memory does not grow with the corpus.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.io import read_safetensors, safetensors_bytes, write_atomically
from memcircuits.base.progress import bar
from memcircuits.data.bos import default_bos, without_bos
from memcircuits.data.formats.listing import find_sources
from memcircuits.data.formats.records import BadRow
from memcircuits.data.formats.sources import Chunk, read_chunks
from memcircuits.data.normalizing import normalized
from memcircuits.data.tokens import (
    TokenizerLike,
    encode,
    encode_all,
    tokenizer_hash,
    tokenizer_of,
    vocabulary_size,
)
from memcircuits.display.html_table import MAX_ROWS, table_html

SCHEMA = "memcircuits.unigrams/1"
COUNTED_HERE = "the given paragraphs"  # source of a table that an analysis counts itself


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

    def _repr_html_(self) -> str:
        import pandas as pd

        order = self.counts.argsort(descending=True, stable=True)[:MAX_ROWS]
        counts = self.counts[order]
        frame = pd.DataFrame({"token": order.tolist(), "count": counts.tolist()})
        frame["share"] = (counts.double() / max(1, self.n_tokens)).tolist()
        n_seen = int((self.counts > 0).sum())
        about = f"{self.n_tokens:,} tokens of {self.source}; {n_seen:,} of {len(self.counts):,} ids"
        return table_html(frame, [about, "The most frequent tokens:"])

    @property
    def n_tokens(self) -> int:
        """Number of tokens counted."""
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
        cls, texts: Iterable[str], model: TokenizerLike, *, source: str = "given texts"
    ) -> UnigramTable:
        """Encode and count texts, which may be a generator and are read once.

        Example:
            >>> table = mc.UnigramTable.from_texts(["the people of the United States"], model)
            >>> table.n_tokens
            6
        """
        tokenizer = tokenizer_of(model)
        counted = cls.from_tokens(
            (encode(text, tokenizer) for text in texts), vocabulary_size(model), source=source
        )
        return cls(counted.counts, source, tokenizer_hash(tokenizer))

    @classmethod
    def from_corpus(
        cls,
        source: str | os.PathLike[str],
        model: TokenizerLike,
        *,
        d_vocab: int | None = None,
        processes: int = 1,
        progress: bool = True,
    ) -> UnigramTable:
        """Count whole documents of a corpus of any size.

        Rows that cannot be used are left out, and `source` of the table says how many. Texts are
        normalised, as `Paragraphs.read` does by default.

        Args:
            source: file, folder or dataset (see `memcircuits.data.formats`).
            model: model or tokenizer that defines the ids.
            d_vocab: size of the vocabulary; by default the model's.
            processes: number of processes that encode and count.
            progress: show a bar on stderr.

        Raises:
            InputError: if no row can be counted.
        """
        at_least("processes", processes, 1)
        tokenizer = tokenizer_of(model)
        size = d_vocab or vocabulary_size(model)
        sources = find_sources(source)
        chunks = (chunk for file in sources for chunk in read_chunks(file))
        total = ChunkCount(np.zeros(size, dtype=np.int64), 0, None)
        with bar(None, "unigrams", unit="token", progress=progress) as progress_bar:
            for count in _counts(chunks, tokenizer, size, processes):
                progress_bar.update(int(count.counts.sum()))
                total += count
        name = sources[0].name if len(sources) == 1 else f"{len(sources)} files"
        return total.table(name, tokenizer)

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
        header = {
            "schema": SCHEMA,
            "source": self.source,
            "tokenizer": self.tokenizer,
            "n_tokens": str(self.n_tokens),
        }
        return write_atomically(
            path, safetensors_bytes({"counts": self.counts.contiguous()}, header)
        )

    def check(self, model: TokenizerLike) -> None:
        """Raise `InputError` unless this is a table, and of the model's tokenizer."""
        if not isinstance(self, UnigramTable):  # called on whatever a caller passed as `unigrams`
            raise InputError("unigrams", repr(self)[:60], "pass a UnigramTable")
        size = vocabulary_size(model)
        if len(self.counts) != size:
            raise InputError(
                "unigrams",
                f"{len(self.counts)} tokens",
                f"the model has {size}; count the corpus with the model's tokenizer",
            )
        tokenizer = getattr(model, "tokenizer", None)
        if self.tokenizer and tokenizer is not None:
            model_hash = tokenizer_hash(tokenizer)
            if model_hash != self.tokenizer:
                raise InputError(
                    "unigrams",
                    f"made with tokenizer {self.tokenizer}",
                    f"the model's is {model_hash}; count the corpus with the model's tokenizer",
                )

    def __repr__(self) -> str:
        return f"UnigramTable({len(self.counts)} ids, {self.n_tokens:,} tokens of {self.source})"


@dataclass(frozen=True)
class ChunkCount:
    """Token counts of some rows; counts of several chunks can be added.

    Attributes:
        counts: occurrences of each token id.
        n_bad: number of rows that could not be used.
        problem: the first of them, with the reason.
    """

    counts: Int[np.ndarray, " d_vocab"]
    n_bad: int
    problem: BadRow | None

    @classmethod
    def of(cls, chunk: Chunk, tokenizer: Any, d_vocab: int) -> ChunkCount:
        """Encode and count one chunk."""
        texts: list[str] = []
        ids: list[list[int]] = []
        bad: list[BadRow] = []
        front = default_bos(tokenizer)
        for row in chunk.rows():
            if isinstance(row, BadRow):
                bad.append(row)
            elif row.ids is None:
                texts.append(normalized(row.text or "")[0])
            elif max(row.ids, default=0) < d_vocab:
                ids.append(without_bos(row.ids, front))
            else:
                bad.append(BadRow(row.where, f"token ids must lie in [0, {d_vocab})"))
        rows = [np.asarray(row, dtype=np.int64) for row in (*encode_all(texts, tokenizer), *ids)]
        counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *rows]), minlength=d_vocab)
        if len(counts) > d_vocab:
            raise InputError("d_vocab", d_vocab, f"the tokenizer gives ids up to {len(counts) - 1}")
        return cls(counts, len(bad), bad[0] if bad else None)

    def __add__(self, other: ChunkCount) -> ChunkCount:
        return ChunkCount(
            self.counts + other.counts, self.n_bad + other.n_bad, self.problem or other.problem
        )

    def table(self, source: str, tokenizer: Any) -> UnigramTable:
        """The counts as a table.

        Raises:
            InputError: if nothing was counted.
        """
        if not self.counts.any():
            problem = self.problem or BadRow(source, "it is empty")
            raise InputError("paragraphs", problem.where, problem.reason)
        if self.n_bad:
            source += f" without {self.n_bad} unusable rows"
        return UnigramTable(torch.from_numpy(self.counts), source, tokenizer_hash(tokenizer))


def _counts(
    chunks: Iterator[Chunk], tokenizer: Any, d_vocab: int, processes: int
) -> Iterator[ChunkCount]:
    """The counts of chunks, in any order; at most two chunks per process are in memory."""
    if processes == 1:
        yield from (ChunkCount.of(chunk, tokenizer, d_vocab) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    waiting: set[Future[ChunkCount]] = set()
    with ProcessPoolExecutor(processes, context, _start_worker, (tokenizer, d_vocab)) as pool:
        for chunk in chunks:
            waiting.add(pool.submit(_count_in_worker, chunk))
            if len(waiting) >= 2 * processes:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


# What a worker process keeps from its start: chunks travel to it without the tokenizer.
_WORKER: dict[str, Any] = {}


def _start_worker(tokenizer: Any, d_vocab: int) -> None:
    _WORKER.update(tokenizer=tokenizer, d_vocab=d_vocab)


def _count_in_worker(chunk: Chunk) -> ChunkCount:
    return ChunkCount.of(chunk, _WORKER["tokenizer"], _WORKER["d_vocab"])
