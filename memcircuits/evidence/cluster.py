"""Ablations shared by several copies of a model, on Ray (extra `ray`).

The effect of a component on a paragraph depends on no other paragraph that is measured, so a worker
takes some paragraphs and components at a time (`Ablation.effects`), and the results are put
together here. Each worker makes the whole ablation from its description, so that means and draws
are those of one process. When a worker dies, Ray starts another one and repeats its task.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.ray_session import import_ray, ray_session
from memcircuits.evidence.ablation import MAX_PARAGRAPHS, MEASURES, Ablation, Part
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt

_TASKS_PER_WORKER = 4  # so that the last ones end at about the same time


@dataclass(frozen=True)
class Cluster:
    """Workers that share the ablations of a ranking.

    Attributes:
        load: loads the model, once in every worker: for instance
            `functools.partial(load_model, "EleutherAI/gpt-neo-125m")`.
        workers: number of models held at once; by default one per GPU, or one without GPUs.
        address: a Ray cluster; by default Ray is started on this machine and stopped afterwards.

    Raises:
        InputError: if Ray is not installed, or for a number of workers below 1.
    """

    load: Callable[[], Any]
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            at_least("workers", self.workers, 1)
        import_ray()  # before anything is measured

    @contextlib.contextmanager
    def ablations(self, adapter: Adapter) -> Iterator[Callable[..., Ablation]]:
        """Inside, what makes an `Ablation` of this model whose effects the workers measure.

        Raises:
            InputError: if Ray cannot be reached, or a worker has other weights.
        """
        with ray_session(self.address) as ray:
            n_gpus = int(ray.cluster_resources().get("GPU", 0))
            n_workers = self.workers or n_gpus or 1
            remote = ray.remote(
                num_cpus=0.5,
                num_gpus=1 if n_gpus else 0,
                max_restarts=-1,
                max_task_retries=-1,
            )(_Worker)
            arguments = (self.load, adapter.fingerprint(), torch.get_num_threads())
            workers = [remote.remote(*arguments) for _ in range(n_workers)]

            def ablation(*given: Any, **options: Any) -> Ablation:
                return _SharedAblation(*given, ray=ray, workers=workers, **options)

            try:
                yield ablation
            finally:
                for worker in workers:
                    ray.kill(worker)


class _Worker:
    """An actor that holds the model."""

    def __init__(self, load: Callable[[], Any], fingerprint: str, threads: int) -> None:
        torch.set_num_threads(threads)  # rounding depends on it
        self.model = load()
        own = adapt(self.model).fingerprint()
        if own != fingerprint:
            raise InputError("model", own, f"a worker must load the weights {fingerprint}")
        self.ablations: dict[bytes, Ablation] = {}

    def effects(
        self,
        name: bytes,
        described: dict[str, Any],
        parts: Sequence[Part],
        rows: Int[Tensor, " row"],
        memory_budget: int | None,
    ) -> Float[Tensor, "row part measure"]:
        """Effects on some paragraphs; an ablation is made once, with its means."""
        if name not in self.ablations:
            self.ablations[name] = Ablation(self.model, **described)
        return self.ablations[name].effects(
            parts, rows, memory_budget=memory_budget, progress=False
        )


class _SharedAblation(Ablation):
    """An ablation whose effects the workers measure; all else is done here."""

    def __init__(
        self,
        *given: Any,
        ray: Any,
        workers: Sequence[Any],
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*given, seed=seed, **options)
        self._ray, self._workers = ray, workers
        self._described = ray.put(
            {
                "paragraphs": self.paragraphs,
                "mode": self.mode,
                "reference": self.reference,
                "seed": seed,
            }
        )

    def effects(
        self,
        parts: Sequence[Part],
        rows: Int[Tensor, " row"] | None = None,
        *,
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> Float[Tensor, "row part measure"]:
        """As `Ablation.effects`."""
        rows = torch.arange(len(self.paragraphs)) if rows is None else rows
        effects = torch.empty(0)
        tasks = list(_tasks(len(rows), len(parts), len(self._workers)))
        name = self._described.binary()

        def start(worker: Any, task: tuple[slice, slice]) -> Any:
            of_rows, of_parts = task
            return worker.effects.remote(
                name, self._described, parts[of_parts], rows[of_rows], memory_budget
            )

        pool = self._ray.util.ActorPool(self._workers)
        n_runs = len(rows) * len(parts)
        with bar(n_runs, "ablate", unit="run", progress=progress) as progress_bar:
            for (of_rows, of_parts), part in zip(tasks, pool.map(start, tasks), strict=True):
                if not len(effects):
                    effects = part.new_empty(len(rows), len(parts), len(MEASURES))
                effects[of_rows, of_parts] = part
                progress_bar.update(part.shape[0] * part.shape[1])
        return effects


def _tasks(n_rows: int, n_parts: int, n_workers: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of paragraphs and parts, several for each worker where there are enough of them."""
    wanted = _TASKS_PER_WORKER * n_workers
    size = min(MAX_PARAGRAPHS, max(1, n_rows // wanted))
    n_row_blocks = math.ceil(n_rows / size)
    width = max(1, math.ceil(n_parts / math.ceil(wanted / n_row_blocks)))
    for row in range(0, n_rows, size):
        for part in range(0, n_parts, width):
            yield slice(row, row + size), slice(part, part + width)
