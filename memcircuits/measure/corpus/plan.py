"""TODO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memcircuits.data.formats.records import Source
from memcircuits.data.formats.sources import Chunk, read_chunks
from memcircuits.data.windows import Windows


@dataclass(frozen=True)
class Plan:
    """What decides the rows of a scan, beside the model.

    Attributes:
        sources: the files, in order.
        windows: what is cut from their rows.
        part_records: a part covers at most so many rows and as many KiB of text.
        batch_size: windows per forward pass; fixed, because rounding depends on it.
    """

    sources: tuple[Source, ...]
    windows: Windows
    part_records: int
    batch_size: int

    def chunks(self, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, Chunk]]:
        """Names and chunks of one shard (index, number of shards)."""
        for file in self.files(shard):
            yield from self.chunks_of(file, shard)

    def files(self, shard: tuple[int, int]) -> list[int]:
        """Indices of the files that a shard reads."""
        every = range(len(self.sources))
        return [f for f in every if len(every) < shard[1] or self.owns(shard, f, 0)]

    def chunks_of(self, file: int, shard: tuple[int, int]) -> Iterator[tuple[str, Chunk]]:
        """Names and chunks of one file that belong to a shard."""
        for chunk in read_chunks(self.sources[file], self.part_records):
            if self.owns(shard, file, chunk.index):
                yield f"{file:05d}-{chunk.index:06d}", chunk

    def owns(self, shard: tuple[int, int], file: int, chunk: int) -> bool:
        """Whether a shard scans a chunk: whole files where there are enough, else every n-th."""
        index, n = shard
        return (file if len(self.sources) >= n else file + chunk) % n == index
