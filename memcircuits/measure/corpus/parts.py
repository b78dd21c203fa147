"""The parts of a corpus scan: chunk in, one parquet file and its counts out.

A part appears complete or not at all: it is written to memory first, then to a temporary file, then
renamed. The counts stand in the file's own metadata, so a part and its counts cannot disagree, and
a scan is resumed by asking which parts can be read. Unusable rows are written before the part, so
that a part that exists has its quarantine.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcircuits.base.io import write_atomically
from memcircuits.base.json_values import json_value
from memcircuits.data.formats.records import BadRow, Row
from memcircuits.data.formats.sources import Chunk
from memcircuits.data.normalizing import Normalize, is_rewritten, total_changes
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.row_notes import row_counts
from memcircuits.data.windows import Cut, cut, retokenization_drift
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.measure.corpus.plan import Plan
from memcircuits.measure.near_verbatim import decoded_where_unknown
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Adapter
from memcircuits.results.provenance import Provenance

WRITTEN_SAMPLE = 64  # rows of a part that are scanned as they are written, too
DRIFT_SAMPLE = 8  # windows of a part that are decoded and encoded again
PART_RECORDS = 4096
PART_NAME = re.compile(r"\.?(\d+)-(\d+)\.(parquet|jsonl)")


class PartWriter:
    """Scans chunks and writes their parts; everything that a worker needs.

    Args:
        adapter: the model.
        plan: what to scan.
        folder: folder of the scan.
    """

    def __init__(self, adapter: Adapter, plan: Plan, folder: Path) -> None:
        self.adapter, self.plan, self.folder = adapter, plan, folder
        self.provenance = Provenance.of(adapter, {})

    def write(self, name: str, chunk: Chunk) -> dict[str, Any]:
        """Scan one chunk, write its part, and return the part's counts."""
        rows = list(chunk.rows())
        cuts = self._cut(rows, self.plan.normalize)
        scan = self._scan(cuts)
        unusable = list(cuts.bad)
        if scan is not None:
            unusable += [
                BadRow(scan.names[i], "its numbers are not finite")
                for i in torch.nonzero(~scan.finite).flatten().tolist()
            ]
        table = part_table(chunk, cuts, scan, measures_of(self.plan))
        counts = {
            **row_counts(len(chunk.raw), cuts),
            "windows": table.num_rows,
            "memorized": 0 if scan is None else int(scan.is_memorized.sum()),
            "tokens": len(cuts.ids) * self.plan.windows.length,
            "quarantined": len(unusable),
            "unread": sum(row.unread for row in unusable),
            "left_out": cuts.left_out,
            "changes": total_changes(row.changes for row in cuts.origin),
            "as_written": self._as_written(rows, cuts, scan),
            **self._drift(cuts),
        }
        if unusable:
            lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in unusable]
            write_atomically(self.folder / "quarantine" / f"{name}.jsonl", "".join(lines))
        write_part(self.folder, name, table, counts)
        return counts

    def _cut(self, rows: Iterable[Row | BadRow], normalize: Normalize) -> Cut:
        return cut(
            rows,
            self.adapter.tokenizer,
            self.plan.windows,
            d_vocab=self.adapter.d_vocab,
            normalize=normalize,
            bos=self.plan.bos,
        )

    def _as_written(
        self, rows: list[Row | BadRow], cuts: Cut, scan: Scan | None
    ) -> dict[str, dict[str, int]]:
        """EM of some rows whose text was normalised, and of the same rows as they are written."""
        sample = [i for i, row in enumerate(cuts.origin) if is_rewritten(row)][:WRITTEN_SAMPLE]
        if scan is None or not sample:
            return {}
        numbers = {cuts.origin[i].number for i in sample}
        written = self._scan(
            self._cut((r for r in rows if isinstance(r, Row) and r.number in numbers), "none")
        )
        if written is None:
            return {}
        windows = torch.from_numpy(np.isin(cuts.rows, sample))
        return {
            name: {"windows": len(em), "em": int(em.sum()), "memorized": int(memorized.sum())}
            for name, em, memorized in (
                ("normalized", scan.em[windows], scan.is_memorized[windows]),
                ("as written", written.em, written.is_memorized),
            )
        }

    def _scan(self, cuts: Cut) -> Scan | None:
        """The scan of the windows of a chunk; None if there are none."""
        if not len(cuts.ids):
            return None
        paragraphs = Paragraphs(
            cuts.ids, self.plan.windows.n_prefix, tuple(cuts.names), bos=self.plan.bos
        )
        size, sampler = self.plan.batch_size, self.plan.sampler
        scores = score_paragraphs(self.adapter, paragraphs, batch_size=size, sampler=sampler)
        greedy = None
        if self.plan.near_verbatim:
            greedy = decoded_where_unknown(self.adapter, paragraphs, scores, progress=False)
        return Scan.of(paragraphs, scores, self.provenance, greedy)

    def _drift(self, cuts: Cut) -> dict[str, int]:
        """How many of some windows get other ids when their text is encoded again."""
        tokenizer = self.adapter.tokenizer
        ids = cuts.ids[:DRIFT_SAMPLE]
        if tokenizer is None:
            return {"drift_sampled": 0, "drifted": 0}
        return {"drift_sampled": len(ids), "drifted": retokenization_drift(ids, tokenizer)}


def part_counts(folder: Path, name: str) -> dict[str, Any] | None:
    """The counts of a part, from its footer; None if it does not exist or is damaged."""
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(part_path(folder, name)).metadata or {}
    except (OSError, ValueError):  # pyarrow's errors derive from these
        return None
    return json.loads(footer[b"memcircuits"]) if b"memcircuits" in footer else None


def part_path(folder: Path, name: str) -> Path:
    """Path of a part."""
    return folder / "parts" / f"{name}.parquet"


def measures_of(plan: Plan) -> tuple[str, ...]:
    """Names of the measures that a scan writes, in the order of their columns."""
    sampled = ("sampled_log_prob",) if plan.sampler else ()
    decoded = ("longest_match", "similarity") if plan.near_verbatim else ()
    always = tuple(name for name in MEASURES if name not in ON_REQUEST)
    return (*always, *sampled, *decoded)


def part_table(chunk: Chunk, cuts: Cut, scan: Scan | None, measures: tuple[str, ...]) -> Any:
    """The windows with finite scores as a pyarrow table, one row per window."""
    import pyarrow as pa

    keep = scan.finite.numpy() if scan else np.zeros(0, dtype=bool)
    rows = [cuts.origin[i] for i in cuts.rows[keep].tolist()]
    columns: dict[str, Any] = {
        "id": [name for name, kept in zip(cuts.names, keep, strict=True) if kept],
        "file": [chunk.source.name] * len(rows),
        "row": [row.number for row in rows],
        "start": cuts.starts[keep],
        "duplicates": cuts.counts[keep],
        "ids": list(cuts.ids[torch.from_numpy(keep)].int().numpy()),
        "facts": [json.dumps(json_value(row.metadata), sort_keys=True) for row in rows],
    }
    for name in measures:
        columns[name] = MEASURES[name](scan).numpy()[keep] if scan else []
    schema = _schema(measures)
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in schema}, schema)


MEASURES: dict[str, Callable[[Scan], Any]] = {
    "em": lambda scan: scan.em,
    "nll": lambda scan: scan.nll,
    "log_prob": lambda scan: scan.log_prob,
    "margin": lambda scan: scan.margin,
    "loose_match": lambda scan: scan.loose_match,
    "min_k": lambda scan: scan.min_k(),
    "extraction_strength": lambda scan: scan.extraction_strength,
    "sampled_log_prob": lambda scan: scan.sampled_log_prob,
    "longest_match": lambda scan: scan.longest_match,
    "similarity": lambda scan: scan.similarity,
}

ON_REQUEST = ("sampled_log_prob", "longest_match", "similarity")
"""Measures that need a sampler, or decoding."""


@functools.cache
def _schema(measures: tuple[str, ...]) -> Any:
    import pyarrow as pa

    integers = {
        **dict.fromkeys(("row", "start", "duplicates"), pa.int64()),
        **dict.fromkeys(("em", "longest_match"), pa.int32()),
    }
    return pa.schema(
        [
            *((name, pa.string()) for name in ("id", "file")),
            *((name, integers[name]) for name in ("row", "start", "duplicates")),
            ("ids", pa.list_(pa.int32())),
            *((name, integers.get(name, pa.float32())) for name in measures),
            ("facts", pa.string()),
        ]
    )


def write_part(folder: Path, name: str, table: Any, counts: dict[str, Any]) -> None:
    """Write a part with its counts, complete or not at all."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = table.replace_schema_metadata({"memcircuits": json.dumps(counts)})
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(part_path(folder, name), buffer.getvalue())
