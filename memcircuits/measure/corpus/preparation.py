"""Checks before a corpus scan: arguments, files, and what the folder holds already.

A scan can take days. Everything that can be refused is refused before its first forward pass: a
source that cannot be read, a folder of another scan, parts that would be scanned again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.io import write_if_absent
from memcircuits.data.bos import Bos, bos_ids, check_bos
from memcircuits.data.formats.listing import list_files
from memcircuits.data.formats.records import BadRow, Columns, Source
from memcircuits.data.formats.sources import read_chunks
from memcircuits.data.formats.text import Txt
from memcircuits.data.normalizing import Normalize, check_normalize
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.manifest import differences, new_manifest, read_manifest
from memcircuits.measure.corpus.parts import PART_NAME, measures_of
from memcircuits.measure.corpus.plan import Plan
from memcircuits.measure.sampling import Sampler
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import rows_that_fit
from memcircuits.results.bos_notes import bos_notes, bos_of_model
from memcircuits.results.provenance import versions


@dataclass(frozen=True)
class ScanOptions:
    """What a caller chose about the rows of a scan; the attributes are arguments of `scan_to_disk`.

    Raises:
        InputError: for an argument that is out of range.
    """

    windows: Windows
    bos: Bos
    columns: Columns
    normalize: Normalize
    part_records: int
    batch_size: int | None
    sampler: Sampler | None = None
    near_verbatim: bool = False
    txt: Txt = "auto"

    def __post_init__(self) -> None:
        check_bos(self.bos)
        check_normalize(self.normalize)
        at_least("part_records", self.part_records, 1)
        if self.batch_size is not None:
            at_least("batch_size", self.batch_size, 1)


def prepare_scan(
    adapter: Adapter,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ScanOptions,
    *,
    resume: bool,
    shard: tuple[int, int],
) -> tuple[Path, Plan]:
    """Check everything and begin or continue a scan; arguments and errors as `scan_to_disk`.

    Returns:
        The folder, which now holds a manifest, and the plan.
    """
    _check_shard(shard)
    windows, part_records = options.windows, options.part_records
    front = bos_ids(adapter, options.bos)
    n_inputs = len(front) + windows.length
    adapter.check_tokens(torch.zeros(1, n_inputs, dtype=torch.long), "windows")
    listing = list_files(
        source, options.columns, txt=options.txt, strided=windows.stride is not None
    )
    sources = tuple(listing.sources)
    _check_readable(sources)
    folder = Path(out)
    _check_folder(folder, sources)
    plan = Plan(
        sources,
        windows,
        part_records,
        options.batch_size or rows_that_fit(adapter, n_inputs, windows.n_continuation),
        front,
        options.normalize,
        options.sampler,
        options.near_verbatim,
    )
    manifest = new_manifest(
        adapter,
        sources,
        windows,
        part_records,
        bos=front,
        columns=options.columns,
        normalize=options.normalize,
    )
    manifest["measures"] = list(measures_of(plan))
    manifest["sampler"] = dataclasses.asdict(plan.sampler) if plan.sampler else None
    if not (folder / "manifest.json").is_file():
        notes = (*listing.notes, *_notes(adapter, front))
        _write_manifest(folder, manifest, plan.batch_size, notes)
    size = _check_manifest(folder, manifest, options.batch_size)
    plan = dataclasses.replace(plan, batch_size=size)
    _check_parts(folder, plan, shard, resume)
    return folder, plan


def _check_folder(folder: Path, sources: tuple[Source, ...]) -> None:
    """Raise `InputError` unless the folder is new, empty or a scan's; its only source may be there.

    A folder of texts that also held a scan would from then on be read as that scan.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError("out", folder.name, "it is a file; give a folder")
    given = Path(sources[0].path).resolve() if len(sources) == 1 else None
    others = sorted(
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.resolve() != given
    )
    # Looked for last: another shard writes the manifest before anything else.
    if others and not (folder / "manifest.json").is_file():
        raise InputError(
            "out", f"{folder.name} holds {others[0]} and no scan", "give a new or an empty folder"
        )


def _check_shard(shard: tuple[int, int]) -> None:
    index, n_shards = shard
    at_least("num_shards", n_shards, 1)
    if not 0 <= index < n_shards:
        raise InputError("shard_index", index, f"give a number from 0 to {n_shards - 1}")


def _check_readable(sources: tuple[Source, ...]) -> None:
    """Raise `InputError` before a long scan if its only file cannot be read at all.

    Among several, such files are quarantined.
    """
    first_chunk = next(read_chunks(sources[0], 1))
    problem = first_chunk.raw[0][1]
    if len(sources) == 1 and isinstance(problem, BadRow) and problem.where == sources[0].name:
        raise InputError("paragraphs", problem.where, problem.reason)


def _notes(adapter: Adapter, front: tuple[int, ...]) -> tuple[str, ...]:
    model = bos_of_model(adapter)
    windows = {"bos": list(front), "as_trained": list(front) == model["bos"]}
    return bos_notes(model, {"windows": windows})


def _write_manifest(
    folder: Path, manifest: dict[str, Any], batch_size: int, notes: tuple[str, ...]
) -> None:
    """Write the manifest, unless another shard was faster.

    Versions, batch size and notes are kept but not compared: another version can be used to
    continue, and the batch size is that of the first process.
    """
    noted = {"batch_size": batch_size, "versions": versions(), "notes": notes}
    write_if_absent(folder / "manifest.json", json.dumps({**manifest, **noted}, indent=1))


def _check_manifest(folder: Path, manifest: dict[str, Any], batch_size: int | None) -> int:
    """Raise `InputError` if the folder holds another scan; returns the scan's batch size."""
    written = read_manifest(folder / "manifest.json")
    if any(written.get(key) != value for key, value in manifest.items()):
        raise InputError(
            "out",
            f"{folder.name} holds a scan with other {differences(written, manifest)}",
            "give what it was begun with, or use another folder",
        )
    begun_with: int = written["batch_size"]
    if batch_size is not None and batch_size != begun_with:
        raise InputError("batch_size", batch_size, f"{folder.name} was begun with {begun_with}")
    return begun_with


def _check_parts(folder: Path, plan: Plan, shard: tuple[int, int], resume: bool) -> None:
    """Raise `InputError` if parts of this shard exist and the scan is not to be resumed.

    Hidden files are what a killed process was about to write; they are deleted.
    """
    own_files = []
    for kind in ("parts", "quarantine"):
        for file in (folder / kind).glob("*"):
            match = PART_NAME.match(file.name)
            if match and plan.owns(shard, int(match[1]), int(match[2])):
                own_files.append(file)
    if not resume and any(not file.name.startswith(".") for file in own_files):
        raise InputError(
            "out",
            f"{folder.name} holds parts of this scan",
            "resume it (--resume), or use another folder",
        )
    for file in own_files:
        if file.name.startswith("."):
            file.unlink(missing_ok=True)
