"""TODO."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcircuits.core.io import write_atomically
from memcircuits.data.formats.records import BadRow
from memcircuits.data.formats.sources import Chunk
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.windows import Cut, cut, retokenization_drift
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.measure.corpus.plan import Plan
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Adapter
from memcircuits.results.provenance import Provenance

DRIFT_SAMPLE = 8  # paragraphs of a part that are encoded again
PART_RECORDS = 4096


PART_NAME = re.compile(r"\.?(\d+)-(\d+)\.(parquet|jsonl)")


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
            scores = score_paragraphs(adapter, paragraphs, batch_size=plan.batch_size)
            scan = Scan.of(paragraphs, scores, self.provenance)
            bad += [
                BadRow(names[i], "its numbers are not finite")
                for i in torch.nonzero(~scan.finite).flatten().tolist()
            ]
        table = part_table(chunk, found, scan)
        counts = {
            "rows": len(chunk.raw),
            "windows": table.num_rows,
            "memorized": 0 if scan is None else int(scan.is_memorized.sum()),
            "tokens": len(found.ids) * plan.windows.length,
            "quarantined": len(bad),
            "left_out": found.left_out,
            **self._drift(found),
        }
        if bad:
            lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in bad]
            write_atomically(self.folder / "quarantine" / f"{name}.jsonl", "".join(lines))
        write_part(self.folder, name, table, counts)
        return counts

    def _drift(self, found: Cut) -> dict[str, int]:
        tokenizer = self.adapter.tokenizer
        ids = found.ids[:DRIFT_SAMPLE]
        if tokenizer is None:
            return {"drift_sampled": 0, "drifted": 0}
        return {"drift_sampled": len(ids), "drifted": retokenization_drift(ids, tokenizer)}


def part_counts(folder: Path, name: str) -> dict[str, Any] | None:
    """The counts of a part, from its footer; None if it is not there or not whole."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(part_path(folder, name)).metadata or {}
    except (OSError, ValueError):  # pyarrow's errors derive from these
        return None
    return json.loads(metadata[b"memcircuits"]) if b"memcircuits" in metadata else None


def part_path(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.parquet"


def part_table(chunk: Chunk, found: Cut, scan: Scan | None) -> Any:
    import pyarrow as pa

    keep = scan.finite.numpy() if scan else np.zeros(0, dtype=bool)
    rows = [found.origin[i] for i in found.rows[keep].tolist()]
    columns: dict[str, Any] = {
        "id": [name for name, kept in zip(found.names, keep, strict=True) if kept],
        "file": [chunk.source.name] * len(rows),
        "row": [row.number for row in rows],
        "start": found.starts[keep],
        "duplicates": found.counts[keep],
        "ids": list(found.ids[torch.from_numpy(keep)].int().numpy()),
        "facts": [json.dumps(row.metadata, default=str, sort_keys=True) for row in rows],
    }
    for name in MEASURES:
        values = MEASURES[name](scan).numpy()[keep] if scan else []
        columns[name] = values
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in _schema()}, _schema())


MEASURES: dict[str, Callable[[Scan], torch.Tensor]] = {
    "em": lambda scan: scan.em,
    "nll": lambda scan: scan.nll,
    "log_prob": lambda scan: scan.log_prob,
    "margin": lambda scan: scan.margin,
    "loose_match": lambda scan: scan.loose_match,
    "min_k": lambda scan: scan.min_k(),
}


@functools.cache
def _schema() -> Any:
    import pyarrow as pa

    whole = {"row": pa.int64(), "start": pa.int64(), "duplicates": pa.int64(), "em": pa.int32()}
    return pa.schema(
        [
            *((name, pa.string()) for name in ("id", "file")),
            *((name, whole[name]) for name in ("row", "start", "duplicates")),
            ("ids", pa.list_(pa.int32())),
            *((name, whole.get(name, pa.float32())) for name in MEASURES),
            ("facts", pa.string()),
        ]
    )


def write_part(folder: Path, name: str, table: Any, counts: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = table.replace_schema_metadata({"memcircuits": json.dumps(counts)})
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(part_path(folder, name), buffer.getvalue())
