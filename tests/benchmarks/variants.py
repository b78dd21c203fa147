"""Other ways to run our own scan: which of them help, and at what cost in exactness?"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcircuits.measure.scanning import scan
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.benchmarks.subjects import Subject
from tests.benchmarks.timing import Contender, seconds


def measure(subject: Subject, rounds: int) -> list[dict[str, Any]]:
    """Each variant against the scan as it is: how many times faster, and how much NLL differs."""

    def scanned(model: Any, batch_size: int | None = None) -> Tensor:
        scan_result = scan(model, subject.paragraphs, batch_size=batch_size, progress=False)
        return torch.stack([scan_result.em.float(), scan_result.nll], -1)

    def spelled_out() -> Tensor:
        adapter = adapt(subject.bridge)
        kept = vars(adapter)["fused_forwards"]
        vars(adapter)["fused_forwards"] = []
        try:
            return scanned(subject.bridge)
        finally:
            vars(adapter)["fused_forwards"] = kept

    def inferring() -> Tensor:
        with torch.inference_mode():
            return scanned(subject.bridge)

    short = as_bridge(
        copy.deepcopy(subject.plain).bfloat16(), subject.bridge.tokenizer, name=subject.name
    )
    variants: dict[str, Callable[[], Tensor]] = {
        "as it is": lambda: scanned(subject.bridge),
        "the model's own forwards (no `memcircuits.models.kernels`)": spelled_out,
        "`torch.inference_mode`": inferring,
        "bfloat16": lambda: scanned(short),
        "one paragraph at a time": lambda: scanned(subject.bridge, 1),
        "all paragraphs at once": lambda: scanned(subject.bridge, len(subject.paragraphs)),
    }
    outputs = {name: run() for name, run in variants.items()}
    usual = outputs["as it is"]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, run in variants.items():
            contender = Contender(name, lambda turn, setting, run=run: run(), 1)
            times[name].append(seconds(contender, turn, None))
    base = times.pop("as it is")
    rows = [
        {
            "name": name,
            "ratio": statistics.median(b / t for b, t in zip(base, variant_times, strict=True)),
            "difference": float((outputs[name] - usual)[:, 1].abs().max()),
            "em_changed": int((outputs[name] - usual)[:, 0].ne(0).sum()),
        }
        for name, variant_times in times.items()
    ]
    compiled = compiling(subject, rounds)
    return rows if compiled is None else [*rows, compiled]


@torch.no_grad()
def compiling(subject: Subject, rounds: int) -> dict[str, Any] | None:
    """What `torch.compile` does to a forward pass of transformers; None without a compiler.

    Not to ours: hooks, which all analyses live on, would break the graph at every activation.
    """
    ids = subject.paragraphs.ids
    usual = subject.plain(ids).logits
    start = time.perf_counter()
    try:
        compiled = torch.compile(subject.plain)
        difference = float((compiled(ids).logits - usual).abs().max())
    except Exception as error:  # whatever stands in the compiler's way
        print(f"no torch.compile: {type(error).__name__}", file=sys.stderr)
        return None
    took = time.perf_counter() - start
    ratios = []
    for _ in range(rounds):
        plain = Contender("plain", lambda turn, setting: subject.plain(ids).logits, 1)
        quick = Contender("compiled", lambda turn, setting: compiled(ids).logits, 1)
        ratios.append(seconds(plain, 0, None) / seconds(quick, 0, None))
    return {
        "name": f"`torch.compile` (transformers' forward against itself; {took:.0f} s to compile)",
        "ratio": statistics.median(ratios),
        "difference": difference,
        "em_changed": 0,
    }
