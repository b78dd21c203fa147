"""Runs kept as JSON, and means, intervals and tables of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from memcircuits.base.statistics import bootstrap_means
from memcircuits.results.provenance import versions
from unlearning_page.setting import SEED, TABLE, VARIANTS, Runs


def collect(work: Path) -> Runs:
    """All runs that are done."""
    return {
        path.relative_to(work).with_suffix("").as_posix(): json.loads(path.read_text())
        for path in sorted(work.rglob("*.json"))
    }


def save(runs: Runs, path: Path) -> None:
    """One run a line, numbers to six digits."""

    def short(number: str) -> float:
        return float(f"{float(number):.6g}")

    short_runs = json.loads(json.dumps(runs), parse_float=short)
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(short_runs.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(runs: Runs, name: str) -> list[dict[str, Any]]:
    """The runs of a name, of all paragraphs that are done."""
    return [run for key, run in sorted(runs.items()) if key.rpartition("/")[0] == name]


def interval(values: Iterable[float], digits: int = 2) -> str:
    data = torch.tensor(list(values), dtype=torch.float64)
    if len(data) < 2:  # one run has no interval
        return f"{float(data.mean()):.{digits}f}"
    draws = bootstrap_means(data[:, None], 2000, torch.Generator().manual_seed(SEED))[:, 0]
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return f"{float(data.mean()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    values = [v for run in runs for v in (run[key] if isinstance(run[key], list) else [run[key]])]
    return sum(values) / len(values)


def change(run: dict[str, Any], before: dict[str, Any]) -> float:
    """Of the perplexity of held-out text, %."""
    return 100 * math.expm1(run["heldout"] - before["heldout"])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


HEAD = [
    "edit",
    "n",
    "memorized EM",
    "unseen KL (nats/token)",
    "unseen own EM (of 50)",
    "perplexity (%)",
]


def row(label: str, runs: list[dict[str, Any]], before: dict[str, Any]) -> list[str]:
    return [
        label,
        str(len(runs)),
        interval((mean([r], "em") for r in runs), 1),
        interval((r["kl"] for r in runs), 5),
        interval((r["own"] for r in runs), 1),
        interval((change(r, before) for r in runs), 2),
    ]


REFERENCES = r"(natural|all|top|random|random-per-tensor)(-[\d.e-]+)?/"
NEEDS = {  # section -> names of its runs
    "The five arms": REFERENCES,
    "The front": REFERENCES,
    "What each part of the recipe does": rf"({'|'.join(VARIANTS)})/",
    "How deep does it go?": rf"(natural|all-tokens|top-{TABLE['top']:g})/",
    "What happens to other recitations": "besides/",
    "All paragraphs in one edit": "together/",
    "Relearning": "relearn/",
    "Noise on weights": "noise/",
    "Where the gradient is": "share/",
}


def versions_line() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())
