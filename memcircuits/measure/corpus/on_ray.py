"""The same scans and counts on Ray: one machine or a cluster (extra `ray`).

Ray Data reads the files in tasks, which yield chunks, and hands them to a pool of actors that hold
the model. An actor writes a part by the function that a local scan uses, so the files are the same.
What is done is decided by the parts in the folder, never by Ray: when a worker dies, Ray repeats
its chunk, the part is written again under the same name, and nothing is lost or there twice. On a
cluster the folder must be one that all nodes share.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.progress import bar
from memcircuits.data.formats.records import Source
from memcircuits.data.formats.sources import find_sources, read_chunks
from memcircuits.data.tokens import tokenizer_of, vocabulary_size
from memcircuits.data.unigrams import ChunkCount, UnigramTable
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.corpus.parts import PART_RECORDS, PartWriter, part_counts
from memcircuits.measure.corpus.plan import Plan
from memcircuits.measure.corpus.scan import finish, prepare
from memcircuits.models.registry import adapt

_COUNTED_RECORDS = 16384


Batch = dict[str, Any]


def scan_with_ray(
    load: Callable[[], Any],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    windows: Windows | None = None,
    part_records: int = PART_RECORDS,
    batch_size: int | None = None,
    resume: bool = False,
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
) -> ScanFolder:
    """`scan_to_disk` on Ray.

    Args:
        load: makes the model; called once here and once in every worker, for instance
            `functools.partial(load_model, "EleutherAI/gpt-neo-125m")`.
        source: file, folder or dataset, at the same place on every node.
        out: folder for the parts, at the same place on every node.
        windows: as in `scan_to_disk`.
        part_records: as in `scan_to_disk`.
        batch_size: as in `scan_to_disk`.
        resume: as in `scan_to_disk`.
        workers: models held at once; by default one per GPU, or one where there is none.
        address: a cluster; by default Ray is started on this machine and ended afterwards.
        progress: show a bar on stderr.

    Raises:
        InputError: as `scan_to_disk` does, and if Ray is not installed or the cluster not reached.
    """
    started = time.perf_counter()
    if workers is not None:
        at_least("workers", workers, 1)
    model = load()
    folder, plan = prepare(
        adapt(model),
        source,
        out,
        windows=windows,
        part_records=part_records,
        batch_size=batch_size,
        resume=resume,
        shard=(0, 1),
    )
    folder, fingerprint = folder.resolve(), adapt(model).fingerprint()
    sources = tuple(_absolute(s) for s in plan.sources)
    plan = Plan(sources, plan.windows, plan.part_records, plan.batch_size)
    del model
    names, tokens = [], 0
    with _ray(address) as ray, bar(None, "scan", unit="token", progress=progress) as shown:
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        rows = (
            ray.data.range(len(sources), override_num_blocks=len(sources))
            .map_batches(_Reading(plan, folder), batch_size=1, num_cpus=0.25)
            .map_batches(
                _Scanning,
                fn_constructor_args=(load, plan, folder, fingerprint, torch.get_num_threads()),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers or n_gpus or 1),
                num_cpus=0.5,
                num_gpus=1 if n_gpus else 0,
            )
            .iter_rows()
        )
        for row in rows:
            names.append(str(row["name"]))
            tokens += int(row["tokens"])
            shown.update(int(row["tokens"]))
    return finish(folder, sorted(set(names)), (0, 1), time.perf_counter() - started, tokens)


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
        source: file, folder or dataset, at the same place on every node.
        model: model or tokenizer that defines the ids.
        d_vocab: size of the vocabulary; by default the model's.
        address: a cluster; by default Ray is started on this machine and ended afterwards.
        progress: show a bar on stderr.

    Raises:
        InputError: as `from_corpus` does, and if Ray is not installed or the cluster not reached.
    """
    tokenizer, size = tokenizer_of(model), d_vocab or vocabulary_size(model)
    sources = [_absolute(s) for s in find_sources(source)]
    total = ChunkCount(np.zeros(size, dtype=np.int64), 0, None)
    with _ray(address) as ray, bar(None, "unigrams", unit="token", progress=progress) as shown:

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
            shown.update(int(row["count"].counts.sum()))
    name = sources[0].name if len(sources) == 1 else f"{len(sources)} files"
    return total.table(name, tokenizer)


class _Reading:
    """Files -> chunks; None in place of a chunk whose part is there."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        for file in batch["id"].tolist():
            for name, chunk in self.plan.chunks_of(file, (0, 1)):
                done = part_counts(self.folder, name) is not None
                yield {"name": np.array([name]), "chunk": _box(None if done else chunk)}


class _Scanning:
    """Chunks -> parts; an actor that holds the model."""

    def __init__(
        self, load: Callable[[], Any], plan: Plan, folder: Path, fingerprint: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)  # rounding depends on it
        self.model = load()
        self.folder = folder
        self.writer = PartWriter(adapt(self.model), plan, folder)
        found = adapt(self.model).fingerprint()
        if found != fingerprint:
            raise InputError("model", found, f"another node has the weights {fingerprint}")

    def __call__(self, batch: Batch) -> Batch:
        tokens = []
        for name, chunk in zip(batch["name"].tolist(), batch["chunk"], strict=True):
            # Asked again: this may be the repetition of a call that died after it wrote its part.
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
    return Source(str(Path(source.path).resolve()), source.name, source.kind)


def _check_address(address: str) -> None:
    """Raise `InputError` if nobody listens there; Ray itself would try for many minutes."""
    if address == "auto":  # Ray looks for a cluster that this machine belongs to
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            "ray_address", address, f"no cluster was reached ({error}); give HOST:PORT or auto"
        ) from None


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, started if it does not run, with small blocks so that all workers get something."""
    # Before the import: Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError:
        raise InputError(
            "engine", "ray", "it is not installed; pip install 'memcircuits[ray]'"
        ) from None
    mine = not ray.is_initialized()
    if address:
        _check_address(address)
    if mine:
        options = {"log_to_driver": False, "logging_level": "error"}
        options |= (
            {"address": address} if address else {"address": "local", "include_dashboard": False}
        )
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises plain ones too, when a node does not start in time
            what = "no cluster was reached" if address else "Ray did not start"
            raise InputError("ray_address", address, f"{what} ({error})") from None
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = 1, False
    try:
        yield ray
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError):
            raise cause from None
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError("engine", "ray: a worker failed", said[-1] if said else "") from error
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
        log.setLevel(level)
        if mine:
            ray.shutdown()
