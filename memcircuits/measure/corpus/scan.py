"""Scans of whole corpora to disk, which survive interruption: no part is lost or written twice.

1. The corpus is cut into chunks (`memcircuits.data.formats.sources`), which depend on its files
   only.
2. A chunk becomes one *part*: its rows are encoded, cut into windows, filtered and scored by one
   forward pass each, and written as one parquet file that appears complete or not at all. The same
   function does this in one process, in a job array and on Ray.
3. `manifest.json` names everything that decides the rows: weights, tokenizer, dtype, weight
   processing, files, windows, tokens in front of them, batch size. A resumed scan (`resume`) skips
   the parts that exist and refuses a folder whose manifest differs. The versions of the first
   process are noted but not compared; another version may round differently.

Rows that cannot be used, and windows whose scores are not finite, are written to `quarantine` with
the reason, before the part that counts them.

| file | content |
| --- | --- |
| `manifest.json` | what the scan is of, written once |
| `parts/00000-000000.parquet` | windows of file 0, chunk 0 |
| `quarantine/00000-000000.jsonl` | its unusable rows and unread ends: `where`, `reason`, `unread` |
| `done/0-of-3.json` | totals of shard 0 of 3, written when it is finished |
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from memcircuits.base.errors import InputError
from memcircuits.base.io import write_atomically
from memcircuits.base.progress import bar
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.bos import Bos
from memcircuits.data.formats.records import Columns, ColumnsLike
from memcircuits.data.formats.text import Txt
from memcircuits.data.normalizing import Normalize
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import EMPTY_COUNTS, ScanFolder, total_counts
from memcircuits.measure.corpus.parts import PART_RECORDS, PartWriter, part_counts
from memcircuits.measure.corpus.preparation import ScanOptions, prepare_scan
from memcircuits.measure.sampling import Sampler
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt


@plain_torch()
def scan_to_disk(  # noqa: PLR0913
    model: Model,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    windows: Windows | None = None,
    txt: Txt = "auto",
    bos: Bos = "auto",
    columns: ColumnsLike = None,
    normalize: Normalize = "auto",
    sampler: Sampler | None = None,
    near_verbatim: bool = False,
    part_records: int = PART_RECORDS,
    batch_size: int | None = None,
    resume: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> ScanFolder:
    """Scan a corpus of any size into a folder of parquet parts.

    Args:
        model: the model.
        source: file, folder or dataset (see `memcircuits.data.formats`).
        out: folder for the parts.
        windows: what to cut from the rows; by default the first 50 + 50 tokens of each.
        txt: what a row of a text file is, as in `Paragraphs.read`.
        bos: tokens in front of every window, as in `Paragraphs.from_texts`.
        columns: the columns that hold the text, as in `Paragraphs.read`.
        normalize: whether texts are normalised, as in `Paragraphs.from_texts`.
        sampler: how text is drawn, as in `scan`; gives a column `sampled_log_prob`.
        near_verbatim: also decode what is not recited in full, as in `scan`; gives columns
            `longest_match` and `similarity`.
        part_records: maximum number of rows per part, and of KiB of text.
        batch_size: windows per forward pass; by default as many as fit. A resumed scan, and the
            other shards, use the first process's.
        resume: continue a scan that was stopped.
        shard: (index, number) of a job array's job; the shards write into one folder.
        progress: show a bar on stderr.

    Raises:
        InputError: for a source that cannot be read, a folder that holds another scan, or one that
            holds this scan while `resume` is not set.
    """
    started = time.perf_counter()
    adapter = adapt(model)
    folder, plan = prepare_scan(
        adapter,
        source,
        out,
        ScanOptions(
            windows or Windows(),
            bos,
            Columns.of(columns),
            normalize,
            part_records,
            batch_size,
            sampler,
            near_verbatim,
            txt,
        ),
        resume=resume,
        shard=shard,
    )
    writer = PartWriter(adapter, plan, folder)
    names: list[str] = []
    scanned_tokens = 0
    with bar(None, "scan", unit="token", progress=progress) as progress_bar:
        for name, chunk in plan.chunks(shard):
            names.append(name)
            if part_counts(folder, name) is None:
                part_tokens = writer.write(name, chunk)["tokens"]
                scanned_tokens += part_tokens
                progress_bar.update(part_tokens)
    return finish_shard(folder, names, shard, time.perf_counter() - started, scanned_tokens)


def finish_shard(
    folder: Path, names: list[str], shard: tuple[int, int], seconds: float, tokens: int
) -> ScanFolder:
    """Check that every part exists, write the shard's totals, and open the folder.

    Args:
        folder: the scan's folder.
        names: the parts of this shard.
        shard: (index, number).
        seconds: how long this run took.
        tokens: number of tokens that it scanned.

    Raises:
        InputError: if a whole corpus gave no window at all.
    """
    counts = {name: part_counts(folder, name) for name in names}
    missing = [name for name, count in counts.items() if count is None]
    if missing:
        raise RuntimeError(f"part {missing[0]} was not written; run again with --resume")
    total = total_counts([EMPTY_COUNTS, *(count for count in counts.values() if count)])
    if shard[1] == 1 and not total["windows"]:
        raise InputError("paragraphs", "no window could be scanned", _reasons(folder, total))
    rate = {"seconds": round(seconds, 3), "tokens_in_these_seconds": tokens}
    write_atomically(
        folder / "done" / f"{shard[0]}-of-{shard[1]}.json", json.dumps({**total, **rate}, indent=1)
    )
    return ScanFolder.open(folder)


def _reasons(folder: Path, total: dict[str, dict[str, int]]) -> str:
    """Why no window was scanned: the filters that left some out, and the first unusable row."""
    reasons = [f"{n} left out ({reason})" for reason, n in total["left_out"].items() if n]
    unusable = ScanFolder.open(folder).quarantine()
    if unusable:
        reasons.append(f"{unusable[0]['where']}; {unusable[0]['reason']}")
    return ", ".join(reasons)
