"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor

from memcircuits.benchmark.units import LocalizationTask, pool
from memcircuits.core.errors import InputError
from memcircuits.measure.fisher import damped_root, fisher_diagonal
from memcircuits.measure.gradients import mean_gradient


def _gradient(case: LocalizationTask) -> list[Tensor]:
    weights = case.adapter.weights()
    _, gradients = mean_gradient(case.adapter, case.targets, weights, None, False)
    return [w.split(g) for w, g in zip(weights, gradients, strict=True)]


def by_gradient(how: str, case: LocalizationTask, unit: str) -> Tensor:
    return pool(case.adapter, _gradient(case), unit, how)


def by_fisher(case: LocalizationTask, unit: str) -> Tensor:
    weights = case.adapter.weights()
    fisher = fisher_diagonal(case.adapter, case.control, weights, 2, case.generator)
    roots = [w.split(r) for w, r in zip(weights, damped_root(fisher), strict=True)]
    scores = [g / root for g, root in zip(_gradient(case), roots, strict=True)]
    return pool(case.adapter, scores, unit, "l2")


def by_product(case: LocalizationTask, unit: str) -> Tensor:
    weights = case.adapter.weights()
    scores = [g * w.values for g, w in zip(_gradient(case), weights, strict=True)]
    return pool(case.adapter, scores, unit, "sum")


def oracle(case: LocalizationTask, unit: str) -> Tensor:
    if case.planted is None:
        raise InputError("planted", "None", "the oracle needs the truth")
    scores = []
    for weight in case.adapter.weights():
        change = torch.zeros(weight.values.numel())
        name = f"{weight.layer}.{weight.component}"
        if name in case.planted.indices:
            change[case.planted.indices[name]] = case.planted.deltas[name].float()
        scores.append(change.view(weight.values.shape))
    return pool(case.adapter, scores, unit, "l2")


def random_scores(case: LocalizationTask, unit: str) -> Tensor:
    n = len(pool(case.adapter, [w.values for w in case.adapter.weights()], unit, "max"))
    # A stream of its own: the place that was written may come from the same seed. (Generators on
    # the CPU look at the lower 32 bits of a seed only.)
    return torch.rand(n, generator=torch.Generator().manual_seed(2**32 - 1 - case.seed))
