"""Scans of whole corpora, to disk: nothing lost, nothing twice, whatever stops them.

1. The corpus is cut into chunks (`memcircuits.data.formats.sources`), which depend on its files alone.
2. A chunk becomes one *part*: its rows are encoded, cut into windows, filtered and measured by one
   forward pass each, and written as one parquet file that appears whole or not at all. The same
   function does this in one process, in a job array and on Ray.
3. `manifest.json` names everything that decides the rows: weights, tokenizer, type, basis, files,
   windows, batch size. A scan that goes on (`resume`) skips the parts that exist and refuses a
   folder whose manifest differs. The versions that began it are noted, not compared: another one
   may round otherwise.

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
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.io import write_atomically, write_if_absent
from memcircuits.core.progress import bar
from memcircuits.data.formats.records import BadRow, Source
from memcircuits.data.formats.sources import find_sources, read_chunks
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import EMPTY_COUNTS, ScanFolder, total_counts
from memcircuits.measure.corpus.manifest import (
    SCHEMA,
    differences,
    model_identity,
    read_manifest,
    source_fingerprint,
)
from memcircuits.measure.corpus.parts import PART_NAME, PART_RECORDS, PartWriter, part_counts
from memcircuits.measure.corpus.plan import Plan
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import versions


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
        source: file, folder or dataset (see `memcircuits.data.formats`).
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
    names, tokens = [], 0
    with bar(None, "scan", unit="token", progress=progress) as shown:
        for name, chunk in plan.chunks(shard):
            names.append(name)
            if part_counts(folder, name) is None:
                new = writer.write(name, chunk)["tokens"]
                tokens += new
                shown.update(new)
    return finish(folder, names, shard, time.perf_counter() - started, tokens)


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
    _check_readable(sources)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError("out", folder.name, "it is a file; give a folder")
    manifest = {
        "schema": SCHEMA,
        "model": model_identity(adapter),
        "windows": dataclasses.asdict(windows),
        "part_records": part_records,
        "sources": [source_fingerprint(s) for s in sources],
    }
    manifest = json.loads(json.dumps(manifest))
    path = folder / "manifest.json"
    if not path.is_file():
        size = batch_size or rows_that_fit(adapter, windows.length, windows.n_continuation)
        more = {"batch_size": size, "versions": versions()}
        write_if_absent(path, json.dumps({**manifest, **more}, indent=1))
    written = read_manifest(path)
    if any(written.get(key) != value for key, value in manifest.items()):
        raise InputError(
            "out",
            f"{folder.name} holds a scan with other {differences(written, manifest)}",
            "give what it was begun with, or use another folder",
        )
    if batch_size is not None and batch_size != written["batch_size"]:
        raise InputError(
            "batch_size", batch_size, f"{folder.name} was begun with {written['batch_size']}"
        )
    plan = Plan(sources, windows, part_records, written["batch_size"])
    mine = [
        file
        for kind in ("parts", "quarantine")
        for file in (folder / kind).glob("*")
        if (found := PART_NAME.match(file.name)) and plan.owns(shard, int(found[1]), int(found[2]))
    ]
    if not resume and any(not file.name.startswith(".") for file in mine):
        raise InputError(
            "out",
            f"{folder.name} holds parts of this scan",
            "resume it (--resume), or use another folder",
        )
    for file in mine:
        if file.name.startswith("."):  # left by a process that was killed
            file.unlink(missing_ok=True)
    return folder, plan


def finish(
    folder: Path, names: list[str], shard: tuple[int, int], seconds: float, tokens: int
) -> ScanFolder:
    """Check that every part is there, write the shard's totals, and open the folder.

    Args:
        folder: the scan's folder.
        names: the parts of this shard.
        shard: (index, number).
        seconds: how long this run took.
        tokens: how many tokens it scanned.

    Raises:
        InputError: if a whole corpus gave no window at all.
    """
    counts = {name: part_counts(folder, name) for name in names}
    missing = [name for name, found in counts.items() if found is None]
    if missing:
        raise RuntimeError(f"part {missing[0]} was not written; run again with --resume")
    total = total_counts([EMPTY_COUNTS, *(found for found in counts.values() if found)])
    if shard[1] == 1 and not total["windows"]:
        problems = ScanFolder.open(folder).quarantine()
        reasons = [f"{n} left out ({why})" for why, n in total["left_out"].items() if n]
        reasons += ["; ".join(problem.values()) for problem in problems[:1]]
        raise InputError("paragraphs", "no window could be scanned", ", ".join(reasons))
    rate = {"seconds": round(seconds, 3), "tokens_in_these_seconds": tokens}
    write_atomically(
        folder / "done" / f"{shard[0]}-of-{shard[1]}.json", json.dumps({**total, **rate}, indent=1)
    )
    return ScanFolder.open(folder)


def _check_readable(sources: tuple[Source, ...]) -> None:
    """Raise `InputError` before a long scan if its only file cannot be read at all.

    Among several, such files are quarantined.
    """
    first = next(read_chunks(sources[0], 1))
    problem = first.raw[0][1]
    if len(sources) == 1 and isinstance(problem, BadRow) and problem.where == sources[0].name:
        raise InputError("paragraphs", problem.where, problem.reason)
