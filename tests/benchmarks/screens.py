"""Where to take the slopes of a screen: how often do the 16 largest hold the 10 best heads?

`memcircuits.evidence.screening` estimates what ablating a head does by a slope, taken somewhere
between the model as it is (0) and the model with every head ablated (1), and ablates the heads with
the largest slopes. Here every head is ablated on 64 recited paragraphs and 64 controls, and the
slopes are taken at several points; then paragraphs are drawn from them many times, as if there were
no others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.screening import attributions
from memcircuits.models.registry import adapt

POINTS = (0.0, 0.05, 0.1, 0.15, 0.25, 0.5)
SIZES = (2, 8, 16, 40)  # recited paragraphs in a draw, and as many controls
BEST, LARGEST = 10, 16
DRAWS, SEED = 200, 0


def measure(model: Any, n: int = 64) -> list[dict[str, Any]]:
    """For each point and size, the share of draws in which all of the best are found."""
    generator = torch.Generator().manual_seed(SEED)
    scan_result = mc.scan(model, mc.Paragraphs.shipped(), progress=False)
    groups = [
        group[torch.randperm(len(group), generator=generator)][:n] for group in sets(scan_result)
    ]
    ablations = [Ablation(model, group, mode="zero") for group in groups]
    heads = adapt(model).heads()
    exact = [ablation.effects(heads, progress=False)[..., 0] for ablation in ablations]
    slopes = {
        at: [attributions(ablation, at=at, progress=False) for ablation in ablations]
        for at in POINTS
    }
    rows = []
    for size in SIZES:
        hits = dict.fromkeys(POINTS, 0)
        for _ in range(DRAWS):
            some = [torch.randperm(len(group), generator=generator)[:size] for group in groups]
            best = set(largest(score(exact, some), BEST))
            for at in POINTS:
                hits[at] += best <= set(largest(score(slopes[at], some), LARGEST))
        rows += [{"size": size, "at": at, "share": hits[at] / DRAWS} for at in POINTS]
    return rows


def sets(scan_result: mc.Scan) -> list[mc.Paragraphs]:
    assert scan_result.memorized is not None
    assert scan_result.control is not None
    return [scan_result.memorized, scan_result.control]


def score(effects: list[Tensor], some: list[Tensor]) -> Tensor:
    memorized, control = (effect[rows].mean(0) for effect, rows in zip(effects, some, strict=True))
    return (memorized - control).flatten()


def largest(values: Tensor, k: int) -> list[int]:
    return values.topk(k).indices.tolist()
