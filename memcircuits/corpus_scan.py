"""Scans of whole corpora, to disk: nothing lost, nothing twice, whatever stops them.

1. The corpus is cut into chunks (`memcircuits.formats`), which depend on its files alone.
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
import functools
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memcircuits.adapter import Adapter, adapt
from memcircuits.checks import InputError, at_least
from memcircuits.formats import (
    BadRow,
    Chunk,
    Source,
    content_files,
    find_sources,
    read_chunks,
)
from memcircuits.memory import rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.readers import Cut, Windows, cut, retokenization_drift
from memcircuits.results import Provenance, versions, write_atomically
from memcircuits.scanning import Scan, buckets, by_repetitions, measured, samples_needed
from memcircuits.unigrams import tokenizer_hash

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "memcircuits.scan-parts/1"
DRIFT_SAMPLE = 8
PART_RECORDS = 4096
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("rows", "windows", "memorized", "tokens", "quarantined"), 0),
    "left_out": {},
    "drift_sampled": 0,
    "drifted": 0,
}
_PART = re.compile(r"\.?(\d+)-(\d+)\.(parquet|jsonl)")


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
            "memorized": 0 if scan is None else int(scan.is_memorized.sum()),
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
        "model": _identity(adapter),
        "windows": dataclasses.asdict(windows),
        "part_records": part_records,
        "sources": [_fingerprint(s) for s in sources],
    }
    manifest = json.loads(json.dumps(manifest))
    path = folder / "manifest.json"
    if not path.is_file():
        size = batch_size or rows_that_fit(adapter, windows.length, windows.n_continuation)
        more = {"batch_size": size, "versions": versions()}
        _write_first(path, json.dumps({**manifest, **more}, indent=1))
    written = _read_manifest(path)
    if any(written.get(key) != value for key, value in manifest.items()):
        raise InputError(
            "out",
            f"{folder.name} holds a scan with other {_differences(written, manifest)}",
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
        if (found := _PART.match(file.name)) and plan.owns(shard, int(found[1]), int(found[2]))
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
    total = _sum([_NOTHING, *(found for found in counts.values() if found)])
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


def part_counts(folder: Path, name: str) -> dict[str, Any] | None:
    """The counts of a part, from its footer; None if it is not there or not whole."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(_part(folder, name)).metadata or {}
    except (OSError, ValueError):  # pyarrow's errors derive from these
        return None
    return json.loads(metadata[b"memcircuits"]) if b"memcircuits" in metadata else None


def _differences(written: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What of a manifest is other than wanted, numbers with both values."""
    found = []
    for key, value in wanted.items():
        old = written.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found += [_difference(k, old.get(k), v) for k, v in value.items() if old.get(k) != v]
        elif old != value:
            found.append(_difference(key, old, value))
    return ", ".join(found)


def _difference(key: str, old: Any, new: Any) -> str:
    short = all(isinstance(value, (int, float, str, type(None))) for value in (old, new))
    return f"{key} ({old} there, {new} here)" if short else key


@dataclass(frozen=True)
class ScanFolder:
    """A folder that `scan_to_disk` wrote or is writing.

    Attributes:
        folder: where it is.
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
        return cls(Path(folder), _read_manifest(Path(folder) / "manifest.json"))

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not complete"
        return f"<ScanFolder {self.folder}: {len(self.parts)} parts, {state}>"

    @property
    def parts(self) -> list[Path]:
        """The parts, in the corpus's order."""
        return sorted((self.folder / "parts").glob("[0-9]*.parquet"))

    @property
    def complete(self) -> bool:
        """Whether all shards are finished."""
        return bool(self._done())

    @property
    def summary(self) -> dict[str, Any]:
        """Totals: rows, windows, tokens, quarantined, left out, drift of re-encoded text."""
        done = self._done()
        if done:
            return _sum(json.loads(path.read_text("utf-8")) for path in done)
        return _sum([_NOTHING, *(part_counts(self.folder, path.stem) or {} for path in self.parts)])

    def _done(self) -> list[Path]:
        for path in (self.folder / "done").glob("0-of-*.json"):
            n = int(path.stem.rpartition("-")[2])
            shards = [path.with_name(f"{i}-of-{n}.json") for i in range(n)]
            if all(shard.is_file() for shard in shards):
                return shards
        return []

    def table(self, **options: Any) -> Any:
        """The rows as a pyarrow table; `columns=` and `filters=` as in `pyarrow.parquet`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables([pq.read_table(part, **options) for part in self.parts])

    def to_frame(self, **options: Any) -> pd.DataFrame:
        """The rows as a pandas table, with the derived measures of `Scan.to_frame` and the facts.

        Exact duplicates of a deduplicated scan are merged over all parts, and counted in
        `duplicates`.

        Args:
            options: see `table`; for instance `filters=[("em", "=", 50)]`.
        """
        import pandas as pd

        table = self.table(**options)
        facts = pd.DataFrame([json.loads(text) for text in table["facts"].to_pylist()])
        frame = table.drop_columns(["facts"]).to_pandas()
        n = self.manifest["windows"]["n_continuation"]
        frame["bits"] = -frame["log_prob"].astype(float) / np.log(2)
        frame["samples"] = samples_needed(frame["log_prob"].to_numpy(float), 0.9)
        frame["bucket"] = buckets(frame["em"].to_numpy(), n)
        frame["memorized"] = frame["em"] == n
        counted = self.manifest["windows"]["deduplicate"]
        if not counted:  # all ones: a column of that name in the corpus tells more
            frame = frame.drop(columns="duplicates")
        for key in facts:
            frame[f"given_{key}" if key in frame else key] = facts[key]
        if counted:
            same = frame["ids"].map(lambda ids: ids.tobytes())
            frame["duplicates"] = frame.groupby(same)["duplicates"].transform("sum")
            frame = frame[~same.duplicated()].reset_index(drop=True)
        return frame

    def paragraphs(self, *, min_em: int | None = None) -> Paragraphs | None:
        """The memorized windows, or those with at least `min_em` tokens recited; None if none."""
        n = self.manifest["windows"]["n_continuation"]
        table = self.table(
            columns=["id", "ids", "em"], filters=[("em", ">=", n if min_em is None else min_em)]
        )
        if not table.num_rows:
            return None
        ids = torch.tensor(table["ids"].to_pylist())
        facts = {"em": tuple(table["em"].to_pylist())}
        n_prefix = self.manifest["windows"]["n_prefix"]
        return Paragraphs(ids, n_prefix, tuple(table["id"].to_pylist()), facts)

    def quarantine(self) -> list[dict[str, str]]:
        """The rows that could not be used: `where` and `reason`."""
        files = sorted((self.folder / "quarantine").glob("[0-9]*.jsonl"))
        return [json.loads(line) for f in files for line in f.read_text("utf-8").splitlines()]

    def figure(self) -> Any:
        """EM and NLL against duplication where counts are known, else against each other."""
        from memcircuits import figures

        frame = self.to_frame()
        try:
            curve = by_repetitions(frame)
        except InputError:
            return figures.em_against_nll(frame)
        return figures.duplication_curve(curve[curve["repetitions"] > 0])


# -- files --------------------------------------------------------------------------------------


def _part(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.parquet"


def _table(chunk: Chunk, found: Cut, scan: Scan | None) -> Any:
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
        "facts": [json.dumps(row.facts, default=str, sort_keys=True) for row in rows],
    }
    for name in _MEASURES:
        values = _MEASURES[name](scan).numpy()[keep] if scan else []
        columns[name] = values
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in _schema()}, _schema())


_MEASURES: dict[str, Callable[[Scan], torch.Tensor]] = {
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
            *((name, whole.get(name, pa.float32())) for name in _MEASURES),
            ("facts", pa.string()),
        ]
    )


def _write_part(folder: Path, name: str, table: Any, counts: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = table.replace_schema_metadata({"memcircuits": json.dumps(counts)})
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(_part(folder, name), buffer.getvalue())


def _identity(adapter: Adapter) -> dict[str, Any]:
    return {
        "fingerprint": adapter.fingerprint(),
        "tokenizer": tokenizer_hash(adapter.tokenizer) if adapter.tokenizer is not None else "",
        "revision": adapter.revision,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "basis": adapter.basis,
    }


def _fingerprint(source: Source) -> dict[str, Any]:
    """Names the content of a source: sizes, and the hash of the first and last 64 KiB."""
    digest = hashlib.sha256()
    size = 0
    files = [path for path in content_files(source) if path.is_file()]
    for path in files:
        n_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            digest.update(file.read(2**16))
            file.seek(max(0, n_bytes - 2**16))
            digest.update(file.read())
        size += n_bytes
    content = {"bytes": size, "ends": digest.hexdigest()[:16]} if files else {}
    return {"name": source.name, "kind": source.kind, **content}


def _check_readable(sources: tuple[Source, ...]) -> None:
    """Raise `InputError` before a long scan if its only file cannot be read at all.

    Among several, such files are quarantined.
    """
    first = next(read_chunks(sources[0], 1))
    problem = first.raw[0][1]
    if len(sources) == 1 and isinstance(problem, BadRow) and problem.where == sources[0].name:
        raise InputError("paragraphs", problem.where, problem.reason)


def _write_first(path: Path, text: str) -> None:
    """Write a file unless another process was first; nobody ever sees half of it."""
    temporary = write_atomically(path.with_name(f".{path.name}.{os.getpid()}"), text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _read_manifest(path: Path) -> dict[str, Any]:
    folder = path.parent.name
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        schema = manifest["schema"]
    except FileNotFoundError:
        raise InputError("out", folder, "it holds no manifest.json of a scan") from None
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError("out", f"{folder}/manifest.json", f"damaged ({error})") from None
    if schema != SCHEMA:
        raise InputError("out", folder, f"its schema is {schema}, this version writes {SCHEMA}")
    return manifest


def _sum(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add up counts, those in nested dictionaries too."""
    total: dict[str, Any] = {}
    for found in counts:
        for key, value in found.items():
            if isinstance(value, dict):
                total[key] = _sum([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total
