"""Is `info --plan` right? `python -m tests.benchmarks.plans` runs what it predicts.

Each analysis is planned and run with few paragraphs, on the shipped organism and on a random model
of the size of GPT-Neo 125M. Both are timed in seconds of the processor, on one thread, so that
other programs change them less. The result is added to docs/capacity.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import memcircuits as mc
from memcircuits.commands.cost_plan import plan
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt
from tests.benchmarks.capacity import PAGE, record
from tests.benchmarks.subjects import N_PREFIX, random_paragraphs, subject

SIZES = {"organism": (400, 20), "random-125m": (20, 4), "random-tiny": (20, 4)}
"""Paragraphs that are scanned, and those of either set that are measured."""

CONTROLS = 80  # of an edit
QUIET: dict[str, Any] = {"progress": False}


def analyses(model: Any, n_scanned: int, n: int) -> dict[str, Callable[[], object]]:
    """What each line of a plan stands for.

    What the model writes by itself is text that it recites: a ranking needs some.
    """
    texts = partial(random_paragraphs, d_vocab=adapt(model).d_vocab)
    memorized = greedy_continuations(model, texts(n, seed=0), **QUIET)
    control, kept = texts(n, seed=1), texts(CONTROLS, seed=2)
    every = memorized + texts(n_scanned - 2 * n, seed=3)

    def ranking(**options: Any) -> Callable[[], object]:
        arguments = {"control": control, **options, **QUIET}
        return lambda: mc.find_memorization_components(model, every, **arguments)

    def both(measure: Callable[..., object]) -> Callable[[], object]:
        def run() -> None:
            mc.scan(model, every + control, **QUIET)
            for paragraphs in (memorized, control):
                measure(model, paragraphs, **QUIET)

        return run

    return {
        "scan": lambda: mc.scan(model, every + control, **QUIET),
        "heads": ranking(units=["head"]),
        "heads --units head,mlp": ranking(),
        "heads --method screen": ranking(units=["head"], method="screen"),
        "gradients": both(mc.parameter_gradients),
        "ablate": both(mc.ablate_heads),
        "perturb": both(mc.perturb_prefix),
        # As planned, one round: every EM is below 101.
        "unlearn": lambda: mc.unlearn(model, memorized[:1], kept, em_below=101, **QUIET),
    }


def compare(name: str) -> list[dict[str, Any]]:
    """Planned and measured seconds of the processor of each analysis of one model."""
    model = subject(name, 2).bridge
    n_scanned, n = SIZES[name]
    lengths = {"n_prefix": N_PREFIX, "n_continuation": 100 - N_PREFIX}
    with mock.patch("time.perf_counter", time.process_time):
        planned = plan(adapt(model), **lengths, n_paragraphs=n_scanned, n_measured=n)
    expected = planned.set_index("analysis")["seconds"]
    rows = []
    for analysis, run in analyses(model, n_scanned, n).items():
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        row = {"model": name, "analysis": analysis, "planned": float(expected[analysis])}
        rows.append(row | {"measured": seconds, "scanned": n_scanned, "n": n})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plans", description=__doc__)
    parser.add_argument("models", nargs="*", default=["organism", "random-125m"])
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record(given.page, plans=[row for name in given.models for row in compare(name)])
    print(given.page)


if __name__ == "__main__":
    main()
