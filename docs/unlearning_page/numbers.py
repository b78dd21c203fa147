"""Runs kept as JSON, and means, intervals and tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memcircuits.base.statistics import bootstrap_means
from memcircuits.results.provenance import versions
from unlearning_page.setting import SEED


def collect(work: Path) -> dict[str, dict[str, Any]]:
    """All runs that are done."""
    return {
        path.relative_to(work).with_suffix("").as_posix(): json.loads(path.read_text())
        for path in sorted(work.rglob("*.json"))
    }


def unpack(runs: Mapping[str, Any], work: Path) -> None:
    """A file for every run, as if it had just been done."""
    for name, run in runs.items():
        path = work / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run), encoding="utf-8")


def save(runs: Mapping[str, Any], path: Path) -> None:
    """One run a line, numbers to six digits."""

    def short(number: str) -> float:
        return float(f"{float(number):.6g}")

    short_runs = json.loads(json.dumps(runs), parse_float=short)
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(short_runs.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(runs: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of a name, of all paragraphs that are done."""
    return [run for key, run in sorted(runs.items()) if key.rpartition("/")[0] == name]


def interval(values: Iterable[float], digits: int = 2) -> str:
    data = torch.tensor(list(values), dtype=torch.float64)
    if len(data) < 2:  # one run has no interval
        return f"{float(data.mean()):.{digits}f}"
    draws = bootstrap_means(data[:, None], 2000, torch.Generator().manual_seed(SEED))[:, 0]
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return f"{float(data.mean()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def versions_line() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())
