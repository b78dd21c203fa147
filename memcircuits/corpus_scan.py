"""Scans of whole corpora, to disk: nothing lost, nothing twice, whatever stops them.

1. The corpus is cut into chunks (`memcircuits.formats`), which depend on its files alone.
2. A chunk becomes one *part*: its rows are encoded, cut into windows, filtered and measured by one
   forward pass each, and written as one parquet file that appears whole or not at all. The same
   function does this in one process, in a job array and on Ray.
3. `manifest.json` names everything that decides the rows: weights, tokenizer, type, basis, files,
   windows, batch size. A scan that goes on (`resume`) skips the parts that exist and refuses a
   folder whose manifest differs.

Rows that cannot be used, and windows whose numbers are not finite, are written to `quarantine` with
the reason, before the part that counts them.

| file | content |
| --- | --- |
| `manifest.json` | what the scan is of, written once |
| `parts/00000-000000.parquet` | windows of file 0, chunk 0 |
| `quarantine/00000-000000.jsonl` | its unusable rows: `where`, `reason`; absent if there are none |
| `done/0-of-3.json` | totals of shard 0 of 3, written when it is finished |
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memcircuits.adapter import Adapter, adapt
from memcircuits.checks import InputError, at_least
from memcircuits.formats import BadRow, Chunk, Source, find_sources, read_chunks
from memcircuits.memory import rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.readers import Cut, Windows, cut, retokenization_drift
from memcircuits.results import Provenance, write_atomically
from memcircuits.scanning import Scan, buckets, by_repetitions, measured, samples_needed
from memcircuits.unigrams import tokenizer_hash

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "memcircuits.scan-parts/1"
DRIFT_SAMPLE = 8
PART_RECORDS = 4096


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
        """Names and chunks of one shard: whole files where there are enough, else every n-th."""
        for file in self.files(shard):
            yield from self.chunks_of(file, shard)

    def files(self, shard: tuple[int, int]) -> list[int]:
        """Indices of the files that a shard reads."""
        index, n = shard
        return [f for f in range(len(self.sources)) if not self._by_file(n) or f % n == index]

    def chunks_of(self, file: int, shard: tuple[int, int]) -> Iterator[tuple[str, Chunk]]:
        """Names and chunks of one file that belong to a shard."""
        index, n = shard
        for chunk in read_chunks(self.sources[file], self.part_records):
            if self._by_file(n) or (file + chunk.index) % n == index:
                yield f"{file:05d}-{chunk.index:06d}", chunk

    def _by_file(self, n: int) -> bool:
        return len(self.sources) >= n


class PartWriter:
    """Scans chunks and writes their parts: all that a worker needs.

    Args:
        adapter: the model.
        plan: what to scan.
        folder: where the parts go.
    """

    def __init__(self, adapter: Adapter, plan: Plan, folder: Path) -> None:
        self.adapter, self.plan, self.folder = adapter, plan, folder
        self.provenance = Provenance.of(adapter, {})

    def write(self, name: str, chunk: Chunk) -> dict[str, Any]:
        """Scan one chunk, write its part, and return the part's counts."""
        plan, adapter = self.plan, self.adapter
        found = cut(chunk.rows(), adapter.tokenizer, plan.windows, d_vocab=adapter.d_vocab)
        scan, bad = None, list(found.bad)
        if len(found.ids):
            names = tuple(found.names)
            paragraphs = Paragraphs(found.ids, plan.windows.n_prefix, names)
            scan = measured(adapter, paragraphs, plan.batch_size, self.provenance)
            bad += [
                BadRow(names[i], "its numbers are not finite")
                for i in torch.nonzero(~scan.finite).flatten().tolist()
            ]
        table = _table(chunk, found, scan)
        counts = {
            "rows": len(chunk.raw),
            "windows": table.num_rows,
            "tokens": len(found.ids) * plan.windows.length,
            "quarantined": len(bad),
            "left_out": found.left_out,
            **self._drift(found),
        }
        if bad:
            lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in bad]
            write_atomically(self.folder / "quarantine" / f"{name}.jsonl", "".join(lines))
        _write_part(self.folder, name, table, counts)
        return counts

    def _drift(self, found: Cut) -> dict[str, int]:
        tokenizer = self.adapter.tokenizer
        ids = found.ids[:DRIFT_SAMPLE]
        if tokenizer is None:
            return {"drift_sampled": 0, "drifted": 0}
        return {"drift_sampled": len(ids), "drifted": retokenization_drift(ids, tokenizer)}


def scan_to_disk(
    model: Any,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    windows: Windows | None = None,
    part_records: int = PART_RECORDS,
    batch_size: int | None = None,
    resume: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> ScanFolder:
    """Scan a corpus of any size into a folder of parquet parts.

    Args:
        model: HookedTransformer or TransformerBridge.
        source: file, folder or dataset (see `memcircuits.readers`).
        out: folder for the parts.
        windows: what to cut from the rows; by default the first 50 + 50 tokens of each.
        part_records: a part covers at most so many rows and as many KiB of text.
        batch_size: windows per forward pass; by default as many as fit. A scan that goes on, and
            the other shards, use the first one's.
        resume: go on with a scan that was stopped.
        shard: (index, number) of a job array's job; the shards write into one folder.
        progress: show a bar on stderr.

    Raises:
        InputError: for a source that cannot be read, a folder that holds another scan, or one that
            holds this scan while `resume` is not set.
    """
    started = time.perf_counter()
    adapter = adapt(model)
    folder, plan = prepare(
        adapter,
        source,
        out,
        windows=windows,
        part_records=part_records,
        batch_size=batch_size,
        resume=resume,
        shard=shard,
    )
    writer = PartWriter(adapter, plan, folder)
    names = []
    with bar(None, "scan", unit="token", progress=progress) as shown:
        for name, chunk in plan.chunks(shard):
            names.append(name)
            if part_counts(folder, name) is None:
                shown.update(writer.write(name, chunk)["tokens"])
    return finish(folder, names, shard, time.perf_counter() - started)


def prepare(
    adapter: Adapter,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    windows: Windows | None,
    part_records: int,
    batch_size: int | None,
    resume: bool,
    shard: tuple[int, int],
) -> tuple[Path, Plan]:
    """Check everything, write the manifest or compare with it; see `scan_to_disk`."""
    at_least("part_records", part_records, 1)
    if batch_size is not None:
        at_least("batch_size", batch_size, 1)
    index, n = shard
    at_least("num_shards", n, 1)
    if not 0 <= index < n:
        raise InputError("shard_index", index, f"give a number from 0 to {n - 1}")
    windows = windows or Windows()
    adapter.check_tokens(torch.zeros(1, windows.length, dtype=torch.long), "windows")
    sources = tuple(find_sources(source))
    _check_readable(sources[0])
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError("out", folder.name, "it is a file; give a folder")
    manifest = {
        "schema": SCHEMA,
        "model": _identity(adapter),
        "windows": dataclasses.asdict(windows),
        "part_records": part_records,
        "sources": [_fingerprint(s) for s in sources],
    }
    manifest = json.loads(json.dumps(manifest))
    path = folder / "manifest.json"
    if not path.is_file():
        size = batch_size or rows_that_fit(adapter, windows.length, windows.n_continuation)
        _write_first(path, json.dumps({**manifest, "batch_size": size}, indent=1))
    written = _read_manifest(path)
    differs = [key for key, value in manifest.items() if written.get(key) != value]
    if differs:
        raise InputError(
            "out",
            f"{folder.name} holds a scan that differs in {', '.join(differs)}",
            "use another folder",
        )
    if batch_size is not None and batch_size != written["batch_size"]:
        raise InputError(
            "batch_size", batch_size, f"{folder.name} was begun with {written['batch_size']}"
        )
    plan = Plan(sources, windows, part_records, written["batch_size"])
    if not resume and any(_belongs(plan, file, shard) for file in (folder / "parts").glob("[0-9]*")):
        raise InputError(
            "out", f"{folder.name} holds parts of this scan", "pass --resume, or another folder"
        )
    for file in (folder / "parts").glob(".[0-9]*"):  # left by a process that was killed
        if _belongs(plan, file, shard):
            file.unlink(missing_ok=True)
    return folder, plan
