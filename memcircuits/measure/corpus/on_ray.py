"""Corpus scans and token counts on Ray, on one machine or a cluster (extra `ray`).

Ray Data reads the files in tasks, which yield chunks, and passes them to a pool of actors that hold
the model. An actor writes a part by the function that a local scan uses, so the files are the same.
Which parts are done is decided by the files in the folder, never by Ray: when a worker dies, Ray
repeats its chunk, the part is written again under the same name, and none is lost or duplicated.
On a cluster the folder must be one that all nodes share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.ray_session import ray_session
from memcircuits.data.bos import Bos
from memcircuits.data.formats.listing import find_sources
from memcircuits.data.formats.records import Columns, ColumnsLike, Source
from memcircuits.data.formats.sources import read_chunks
from memcircuits.data.formats.text import Txt
from memcircuits.data.normalizing import Normalize
from memcircuits.data.tokens import tokenizer_of, vocabulary_size
from memcircuits.data.unigrams import ChunkCount, UnigramTable
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.corpus.parts import PART_RECORDS, PartWriter, part_counts
from memcircuits.measure.corpus.plan import Plan
from memcircuits.measure.corpus.preparation import ScanOptions, prepare_scan
from memcircuits.measure.corpus.scan import finish_shard
from memcircuits.measure.sampling import Sampler
from memcircuits.models.registry import adapt

Batch = dict[str, Any]

_COUNTED_RECORDS = 16384  # rows per chunk when tokens are counted


def scan_with_ray(  # noqa: PLR0913
    load: Callable[[], Any],
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
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
) -> ScanFolder:
    """`scan_to_disk` on Ray.

    Args:
        load: loads the model; called once here and once in every worker, for instance
            `functools.partial(load_model, "EleutherAI/gpt-neo-125m")`.
        source: file, folder or dataset, under the same path on every node.
        out: folder for the parts, under the same path on every node.
        windows: as in `scan_to_disk`.
        txt: as in `scan_to_disk`.
        bos: as in `scan_to_disk`.
        columns: as in `scan_to_disk`.
        normalize: as in `scan_to_disk`.
        sampler: as in `scan_to_disk`.
        near_verbatim: as in `scan_to_disk`.
        part_records: as in `scan_to_disk`.
        batch_size: as in `scan_to_disk`.
        resume: as in `scan_to_disk`.
        workers: number of models held at once; by default one per GPU, or one without GPUs.
        address: a cluster; by default Ray is started on this machine and stopped afterwards.
        progress: show a bar on stderr.

    Raises:
        InputError: as `scan_to_disk` does, and if Ray is missing or cannot be reached.
    """
    started = time.perf_counter()
    if workers is not None:
        at_least("workers", workers, 1)
    model = load()
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
        shard=(0, 1),
    )
    # Workers run in other folders, and load the model anew.
    folder = folder.resolve()
    plan = dataclasses.replace(plan, sources=tuple(_absolute(s) for s in plan.sources))
    scanner_arguments = (load, plan, folder, adapter.fingerprint(), torch.get_num_threads())
    del model, adapter

    names: list[str] = []
    scanned_tokens = 0
    with (
        ray_session(address) as ray,
        _quiet_small_blocks(ray),
        bar(None, "scan", unit="token", progress=progress) as progress_bar,
    ):
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        n_files = len(plan.sources)
        chunks = ray.data.range(n_files, override_num_blocks=n_files).map_batches(
            _Reader(plan, folder), batch_size=1, num_cpus=0.25
        )
        parts = chunks.map_batches(
            _Scanner,
            fn_constructor_args=scanner_arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers or n_gpus or 1),
            num_cpus=0.5,
            num_gpus=1 if n_gpus else 0,
        )
        for part in parts.iter_rows():
            names.append(str(part["name"]))
            scanned_tokens += int(part["tokens"])
            progress_bar.update(int(part["tokens"]))
    seconds = time.perf_counter() - started
    return finish_shard(folder, sorted(set(names)), (0, 1), seconds, scanned_tokens)


def count_with_ray(
    source: str | os.PathLike[str],
    model: Any,
    *,
    d_vocab: int | None = None,
    address: str | None = None,
    progress: bool = True,
) -> UnigramTable:
    """`UnigramTable.from_corpus` on Ray, by as many tasks as there are cores.

    Args:
        source: file, folder or dataset, under the same path on every node.
        model: model or tokenizer that defines the ids.
        d_vocab: size of the vocabulary; by default the model's.
        address: a cluster; by default Ray is started on this machine and stopped afterwards.
        progress: show a bar on stderr.

    Raises:
        InputError: as `from_corpus` does, and if Ray is missing or cannot be reached.
    """
    tokenizer, size = tokenizer_of(model), d_vocab or vocabulary_size(model)
    sources = [_absolute(s) for s in find_sources(source)]
    total = ChunkCount(np.zeros(size, dtype=np.int64), 0, None)
    with (
        ray_session(address) as ray,
        _quiet_small_blocks(ray),
        bar(None, "unigrams", unit="token", progress=progress) as progress_bar,
    ):

        def read(batch: Batch) -> Iterator[Batch]:
            for file in batch["id"].tolist():
                for chunk in read_chunks(sources[file], _COUNTED_RECORDS):
                    yield {"chunk": _box(chunk)}

        def count(batch: Batch) -> Batch:
            return {"count": _box(ChunkCount.of(batch["chunk"][0], tokenizer, size))}

        data = ray.data.range(len(sources), override_num_blocks=len(sources))
        data = data.map_batches(read, batch_size=1, num_cpus=0.25)
        for row in data.map_batches(count, batch_size=1).iter_rows():
            total += row["count"]
            progress_bar.update(int(row["count"].counts.sum()))
    name = sources[0].name if len(sources) == 1 else f"{len(sources)} files"
    return total.table(name, tokenizer)


class _Reader:
    """Files -> chunks; None in place of a chunk whose part exists."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        for file in batch["id"].tolist():
            for name, chunk in self.plan.chunks_of(file, (0, 1)):
                done = part_counts(self.folder, name) is not None
                yield {"name": np.array([name]), "chunk": _box(None if done else chunk)}


class _Scanner:
    """Chunks -> parts: an actor that holds the model."""

    def __init__(
        self, load: Callable[[], Any], plan: Plan, folder: Path, fingerprint: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)  # rounding depends on it
        self.model = load()
        self.folder = folder
        self.writer = PartWriter(adapt(self.model), plan, folder)
        own = adapt(self.model).fingerprint()
        if own != fingerprint:
            raise InputError("model", own, f"another node has the weights {fingerprint}")

    def __call__(self, batch: Batch) -> Batch:
        tokens = []
        for name, chunk in zip(batch["name"].tolist(), batch["chunk"], strict=True):
            # Checked again: an earlier call may have died after it wrote its part.
            done = chunk is None or part_counts(self.folder, name) is not None
            tokens.append(0 if done else self.writer.write(name, chunk)["tokens"])
        return {"name": batch["name"], "tokens": np.array(tokens)}


def _box(value: Any) -> np.ndarray:
    """A column of one Python object."""
    column = np.empty(1, dtype=object)
    column[0] = value
    return column


def _absolute(source: Source) -> Source:
    if source.kind == "hf":
        return source
    return dataclasses.replace(source, path=str(Path(source.path).resolve()))


@contextlib.contextmanager
def _quiet_small_blocks(ray: Any) -> Iterator[None]:
    """Silence Ray Data, and make its blocks small so that every worker gets some."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    logger.setLevel(logging.ERROR)
    context.target_max_block_size, context.enable_progress_bars = 1, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
        logger.setLevel(level)
