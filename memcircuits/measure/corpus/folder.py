"""A folder that a corpus scan wrote: its rows as tables, its memorized windows, its totals.

Rows are read part by part in the order of the corpus, so the result does not depend on how many
processes wrote them or how often the scan was interrupted. Measures that follow from EM and
log-probability are computed when a table is read (`memcircuits.measure.recitation_statistics`) and
take no space on disk. An unfinished scan can be read as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memcircuits.base.errors import InputError
from memcircuits.base.json_values import python_value
from memcircuits.data.groups import GROUP_COLUMN
from memcircuits.data.normalizing import in_words
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.row_notes import row_notes
from memcircuits.data.tokens import TokenizerLike
from memcircuits.measure.corpus.manifest import read_manifest
from memcircuits.measure.corpus.parts import part_counts
from memcircuits.measure.near_verbatim import NEAR_VERBATIM
from memcircuits.measure.overlapping_windows import best_apart
from memcircuits.measure.recitation_statistics import by_repetitions, em_buckets, samples_needed
from memcircuits.measure.snippets import passage_text, snippet

if TYPE_CHECKING:
    import pandas as pd


EMPTY_COUNTS: dict[str, Any] = {
    **dict.fromkeys(("rows", "windows", "memorized", "tokens", "quarantined", "unread"), 0),
    **dict.fromkeys(("short", "unusable", "longer"), 0),
    "left_out": {},
    "changes": {},
    "as_written": {},
    "drift_sampled": 0,
    "drifted": 0,
}


@dataclass(frozen=True)
class ScanFolder:
    """A folder that `scan_to_disk` wrote or is writing.

    Attributes:
        folder: its path.
        manifest: what the scan is of.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ScanFolder:
        """Open a folder.

        Raises:
            InputError: if it holds no scan.
        """
        return cls(Path(folder), read_manifest(Path(folder) / "manifest.json"))

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not complete"
        return f"<ScanFolder {self.folder}: {len(self.parts)} parts, {state}>"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know."""
        totals = self.summary
        notes = list(self.manifest.get("notes", ()))
        windows = self.manifest["windows"]
        notes += row_notes(totals, windows["n_prefix"] + windows["n_continuation"])
        if totals.get("changes"):
            notes.append(f"Changed before encoding: {in_words(totals['changes'])}.")
        if totals.get("as_written"):
            means = [
                f"{group['em'] / max(1, group['windows']):.2f} {name} ({group['memorized']} of "
                f"{group['windows']} windows memorized)"
                for name, group in totals["as_written"].items()
            ]
            notes.append(f"Mean EM of some texts that normalising changed: {', '.join(means)}.")
        return tuple(notes)

    @property
    def parts(self) -> list[Path]:
        """The parts, in the corpus's order."""
        return sorted((self.folder / "parts").glob("[0-9]*.parquet"))

    @property
    def complete(self) -> bool:
        """Whether all shards are finished."""
        return bool(self._shard_totals())

    @property
    def summary(self) -> dict[str, Any]:
        """Totals: rows, windows, tokens, quarantined, left out, drift of re-encoded text."""
        shard_totals = self._shard_totals()
        if shard_totals:
            return total_counts(json.loads(path.read_text("utf-8")) for path in shard_totals)
        counts = (part_counts(self.folder, path.stem) or {} for path in self.parts)
        return total_counts([EMPTY_COUNTS, *counts])

    def _shard_totals(self) -> list[Path]:
        """The files with the totals of all shards; empty if a shard is not finished."""
        for path in (self.folder / "done").glob("0-of-*.json"):
            n_shards = int(path.stem.rpartition("-")[2])
            shards = [path.with_name(f"{i}-of-{n_shards}.json") for i in range(n_shards)]
            if all(shard.is_file() for shard in shards):
                return shards
        return []

    def table(self, **options: Any) -> Any:
        """The rows as a pyarrow table; `columns=` and `filters=` as in `pyarrow.parquet`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables([pq.read_table(part, **options) for part in self.parts])

    def to_frame(self, **options: Any) -> pd.DataFrame:
        """The rows as a pandas table, with the measures of `Scan.to_frame` and the metadata.

        Exact duplicates of a deduplicated scan are merged over all parts, and counted in
        `duplicates`.

        Args:
            options: see `table`; for instance `filters=[("em", "=", 50)]`.
        """
        import pandas as pd

        table = self.table(**options)
        facts = table["facts"].to_pylist()
        metadata = pd.DataFrame([json.loads(text, object_hook=python_value) for text in facts])
        frame = table.drop_columns(["facts"]).to_pandas()
        n_continuation = self.manifest["windows"]["n_continuation"]
        frame["bits"] = -frame["log_prob"].astype(float) / np.log(2)
        drawn = "sampled_log_prob" if "sampled_log_prob" in frame else "log_prob"
        frame["samples"] = samples_needed(frame[drawn].to_numpy(float), 0.9)
        if "similarity" in frame:
            frame["near_verbatim"] = frame["similarity"] >= np.float32(NEAR_VERBATIM)
        frame["bucket"] = em_buckets(frame["em"].to_numpy(), n_continuation)
        frame["memorized"] = frame["em"] == n_continuation
        deduplicated = self.manifest["windows"]["deduplicate"]
        if not deduplicated:  # all ones, and the corpus may have a column of that name
            frame = frame.drop(columns="duplicates")
        for key in metadata:
            frame[f"given_{key}" if key in frame else key] = metadata[key]
        if deduplicated:  # each part merged its own duplicates
            content = frame["ids"].map(lambda ids: ids.tobytes())
            frame["duplicates"] = frame.groupby(content)["duplicates"].transform("sum")
            frame = frame[~content.duplicated()].reset_index(drop=True)
        return frame

    def paragraphs(self, *, min_em: int | None = None) -> Paragraphs | None:
        """The memorized windows, or those with at least `min_em` tokens recited; None if none.

        The column `document` says which row of the corpus each is from, so that the windows of one
        row are one group (`Paragraphs.groups`), unless the corpus has a column `group`.
        """
        least = self.manifest["windows"]["n_continuation"] if min_em is None else min_em
        columns = ["id", "ids", "em", "file", "row", "facts"]
        table = self.table(columns=columns, filters=[("em", ">=", least)])
        if not table.num_rows:
            return None
        ids = torch.tensor(table["ids"].to_pylist())
        places = zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True)
        metadata: dict[str, tuple[Any, ...]] = {
            "em": tuple(table["em"].to_pylist()),
            "document": tuple(f"{file}:{row}" for file, row in places),
        }
        facts = [json.loads(text, object_hook=python_value) for text in table["facts"].to_pylist()]
        if any(GROUP_COLUMN in fact for fact in facts):
            metadata[GROUP_COLUMN] = tuple(fact.get(GROUP_COLUMN) for fact in facts)
        n_prefix = self.manifest["windows"]["n_prefix"]
        bos = tuple(self.manifest["bos"])
        return Paragraphs(ids, n_prefix, tuple(table["id"].to_pylist()), metadata, bos)

    def longest(self, n: int = 10, model: TokenizerLike | None = None) -> pd.DataFrame:
        """The longest recitations as text, with the columns of `Scan.longest` but the own ones.

        One part is in memory at a time.

        Args:
            n: maximum number of rows.
            model: model or tokenizer; without one, `text` holds token ids.
        """
        import pandas as pd
        import pyarrow.parquet as pq

        n_continuation = self.manifest["windows"]["n_continuation"]
        written = pq.read_schema(self.parts[0]).names if self.parts else []
        on_request = [name for name in ("sampled_log_prob", "similarity") if name in written]
        columns = ["id", "em", "nll", *on_request]
        best = pd.DataFrame({name: [] for name in (*columns, "ids")})
        for part in self.parts:
            rows = pq.read_table(part, columns=[*columns, "ids"]).to_pandas()
            rows = rows if best.empty else pd.concat([best, rows], ignore_index=True)
            rows = rows.sort_values(["em", "nll"], ascending=[False, True], kind="stable")
            ids, order = np.stack(rows["ids"]), range(len(rows))
            best = rows.iloc[best_apart(list(rows["id"]), ids, n_continuation, order, n)]
        if "sampled_log_prob" in best:
            drawn = best.pop("sampled_log_prob").to_numpy(float)
            best.insert(3, "samples", samples_needed(drawn, 0.9))
        n_prefix = self.manifest["windows"]["n_prefix"]
        texts = [
            snippet(passage_text(ids.tolist(), n_prefix, int(em), model))
            for ids, em in zip(best["ids"], best["em"], strict=True)
        ]
        return best.drop(columns="ids").assign(text=texts).reset_index(drop=True)

    def quarantine(self) -> list[dict[str, Any]]:
        """The rows that could not be used: `where`, `reason`, and `unread` for ends of files."""
        files = sorted((self.folder / "quarantine").glob("[0-9]*.jsonl"))
        return [json.loads(line) for f in files for line in f.read_text("utf-8").splitlines()]

    def figure(self) -> Any:
        """EM and NLL against duplication where counts are known, else against each other."""
        from memcircuits.display import figures

        frame = self.to_frame()
        try:
            curve = by_repetitions(frame)
        except InputError:
            return figures.em_against_nll(frame)
        return figures.duplication_curve(curve[curve["repetitions"] > 0])


def total_counts(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums of counts, including those in nested dictionaries."""
    total: dict[str, Any] = {}
    for count in counts:
        for key, value in count.items():
            if isinstance(value, dict):
                total[key] = total_counts([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total
