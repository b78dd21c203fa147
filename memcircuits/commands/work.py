"""What `--verbose` says of a command's work: how often the models ran, and how long it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import typer

_COUNTS: ContextVar[contextlib.ExitStack | None] = ContextVar("counts", default=None)
"""The counts of the command that runs; None if it was not given `--verbose`."""


@contextlib.contextmanager
def saying_work(verbose: bool) -> Iterator[None]:
    """Say on stderr, on leaving, how often each model that `count_work` was told of has run."""
    if not verbose:
        yield
        return
    with contextlib.ExitStack() as counts:
        token = _COUNTS.set(counts)
        try:
            yield
        finally:
            _COUNTS.reset(token)


def count_work(model: Any, name: str) -> None:
    """Count how often a model runs from here on, if the command was given `--verbose`."""
    counts = _COUNTS.get()
    if counts is not None:
        counts.enter_context(_counted(model, name))


@contextlib.contextmanager
def _counted(model: Any, name: str) -> Iterator[None]:
    from memcircuits.benchmark.units import count_forwards
    from memcircuits.models.registry import adapt

    start, busy = time.perf_counter(), time.process_time()
    with count_forwards(adapt(model)) as cost:
        yield
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    typer.echo(
        f"{name}: {cost['forwards']:,.1f} forward passes of one row of tokens (a backward pass "
        f"counts as two); {seconds:.1f} s, {processor:.1f} s of processors",
        err=True,
    )
