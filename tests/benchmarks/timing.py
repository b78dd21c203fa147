"""Turns, medians, batch sizes and arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Contender:
    """One way to do a job.

    Attributes:
        name: shown in the table.
        run: does the job for a round (or, given None, a share of one) with a setting, and gives its
            output.
        units: how many units of work (paragraphs, or heads x paragraphs, ...) a round is.
        settings: batch sizes and the like to choose from.
        target: how many times faster ours wants to be.
    """

    name: str
    run: Callable[[int | None, Any], Tensor]
    units: float
    settings: Sequence[Any] = (None,)
    target: float | None = None


@dataclass(frozen=True)
class Job:
    """Ours and the rivals.

    Attributes:
        name: of the job.
        unit: what one unit of work is.
        ours: this package.
        rivals: the others.
        tolerance: how much outputs may differ.
        compare: which parts of the outputs are compared.
        note: for the reader.
    """

    name: str
    unit: str
    ours: Contender
    rivals: Sequence[Contender]
    tolerance: float
    compare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = field(
        default=lambda ours, theirs: (ours, theirs)
    )
    note: str = ""


def measure(
    job: Job, rounds: int, say: Callable[[str], None], *, warm_up: bool = True
) -> dict[str, Any]:
    """Choose the rivals' batch sizes, compare outputs, then let all take turns.

    Outputs are compared and arithmetic is counted in a turn of its own or, without `warm_up`, in
    the first one that is timed: where a turn takes many seconds, counting adds nothing to it.
    """
    contenders = [job.ours, *job.rivals]
    settings, outputs, arithmetic = [], [], []
    times: list[list[float]] = [[] for _ in contenders]
    for i, contender in enumerate(contenders):
        settings.append(tuned(contender, warm_up=warm_up))
        start = clock()
        with FlopCounterMode(display=False) as counted:
            outputs.append(contender.run(0, settings[-1]))
        if not warm_up:
            times[i].append((clock() - start) / contender.units)
        arithmetic.append(counted.get_total_flops() / contender.units)
    for turn in range(0 if warm_up else 1, rounds):
        order = range(len(contenders))
        for i in [*order[turn % len(contenders) :], *order[: turn % len(contenders)]]:
            times[i].append(seconds(contenders[i], turn, settings[i]) / contenders[i].units)
    rows = []
    for i, contender in enumerate(contenders):
        per_unit = statistics.median(times[i])
        row: dict[str, Any] = {
            "name": contender.name,
            "setting": settings[i],
            "seconds_per_unit": per_unit,
            "gflop_per_unit": arithmetic[i] / 1e9,
            "gflop_per_second": arithmetic[i] / per_unit / 1e9,
        }
        if i:
            ratios = [theirs / ours for ours, theirs in zip(times[0], times[i], strict=True)]
            ours, theirs = job.compare(outputs[0], outputs[i])
            apart = (ours.double() - theirs.double()).abs()
            row |= {
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "target": contender.target,
                "difference": float(apart.max()) if apart.numel() else None,
                "tolerance": job.tolerance,
            }
            say(f"    {contender.name}: {row['ratio']:.2f}x, difference {row['difference']}")
        rows.append(row)
    return {
        "job": job.name,
        "unit": job.unit,
        "rounds": rounds,
        "note": job.note,
        "rows": rows,
    }


def tuned(contender: Contender, *, warm_up: bool = True) -> Any:
    """The setting at which a contender is fastest, tried on a share of the first round."""
    if len(contender.settings) == 1:
        return contender.settings[0]
    if warm_up:  # the first run of all pays for what is made once
        contender.run(None, contender.settings[0])
    return min(contender.settings, key=lambda setting: seconds(contender, None, setting))


def clock() -> float:
    """Seconds: with one thread those of the processor, which neighbours on it do not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(contender: Contender, turn: int | None, setting: Any) -> float:
    start = clock()
    contender.run(turn, setting)
    return clock() - start


def matrix_product_rate(size: int = 4096, repeats: int = 5) -> float:
    """GFLOP/s of a large fp32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats + 1):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9
