"""The plan of a corpus scan: which windows are scanned, in which parts, by which shard.

A corpus is cut into chunks that depend on its files only, never on the number of processes. Shards
of a job array share out these chunks: whole files where there are at least as many files as shards,
otherwise every n-th chunk of each file. Each chunk becomes one part, named by file and chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memcircuits.data.formats.records import Source
from memcircuits.data.formats.sources import Chunk, read_chunks
from memcircuits.data.normalizing import Normalize
from memcircuits.data.windows import Windows
from memcircuits.measure.sampling import Sampler


@dataclass(frozen=True)
class Plan:
    """What decides the rows of a scan, beside the model.

    Attributes:
        sources: the files, in order.
        windows: what is cut from their rows.
        part_records: maximum number of rows per part, and of KiB of text.
        batch_size: windows per forward pass; fixed, because rounding depends on it.
        bos: ids of the tokens in front of every window.
        normalize: whether texts are normalised before they are encoded.
        sampler: how text is drawn, if the probabilities of samples are asked for.
        near_verbatim: whether windows are decoded that are not recited in full.
    """

    sources: tuple[Source, ...]
    windows: Windows
    part_records: int
    batch_size: int
    bos: tuple[int, ...] = ()
    normalize: Normalize = "auto"
    sampler: Sampler | None = None
    near_verbatim: bool = False

    def chunks(self, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, Chunk]]:
        """Part names and chunks of one shard (index, number of shards)."""
        for file in self.files(shard):
            yield from self.chunks_of(file, shard)

    def files(self, shard: tuple[int, int]) -> list[int]:
        """Indices of the files that a shard reads."""
        n_files, n_shards = len(self.sources), shard[1]
        # With fewer files than shards, every shard reads all files and scans some of the chunks.
        return [i for i in range(n_files) if n_files < n_shards or self.owns(shard, i, 0)]

    def chunks_of(self, file: int, shard: tuple[int, int]) -> Iterator[tuple[str, Chunk]]:
        """Part names and chunks of one file that belong to a shard."""
        for chunk in read_chunks(self.sources[file], self.part_records):
            if self.owns(shard, file, chunk.index):
                yield f"{file:05d}-{chunk.index:06d}", chunk

    def owns(self, shard: tuple[int, int], file: int, chunk: int) -> bool:
        """Whether a shard scans a chunk."""
        index, n_shards = shard
        position = file if len(self.sources) >= n_shards else file + chunk
        return position % n_shards == index
