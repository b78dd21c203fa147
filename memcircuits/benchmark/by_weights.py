"""Localizers that read gradients of the weights, and the two bounds.

The gradient of the targets' NLL says how a small change of each weight would change what the model
recites. `gradient-max`, `gradient-mean` and `gradient-l2` pool its absolute value over the weights
of a unit; the maximum is the paper's map (arXiv 2403.19851, section 4.1). `gradient-fisher` divides
by the root of the Fisher information of the controls, so that weights on which every text depends
count less. `gradient-x-weight` estimates the effect of setting a weight to zero. `oracle` reads
what planting changed and `random` draws scores: the best and the worst that can be expected.
`weight-norm` and `norm-in-layer` read no text: where they find the place, planting gives it away.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.benchmark.units import (
    LocalizationTask,
    Pooling,
    Unit,
    pool_scores,
    scatter_planted,
)
from memcircuits.measure.fisher import damped_root, fisher_diagonal
from memcircuits.measure.gradients import mean_gradient


def _target_gradients(task: LocalizationTask) -> list[Float[Tensor, "head d_in d_out"]]:
    """Gradient of the targets' mean NLL in every weight."""
    weights = task.adapter.weights()
    _, gradients = mean_gradient(task.adapter, task.targets, weights, progress=False)
    return [weight.split(grad) for weight, grad in zip(weights, gradients, strict=True)]


def by_gradient(pooling: Pooling, task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Absolute gradient of the targets' NLL, pooled over the unit's weights."""
    return pool_scores(task.adapter, _target_gradients(task), unit, pooling)


def by_fisher(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Norm of the gradient divided by the root of the controls' diagonal Fisher information."""
    weights = task.adapter.weights()
    fisher = fisher_diagonal(task.adapter, task.control, weights, 2, task.generator)
    roots = [weight.split(root) for weight, root in zip(weights, damped_root(fisher), strict=True)]
    gradients = _target_gradients(task)
    scaled = [grad / root for grad, root in zip(gradients, roots, strict=True)]
    return pool_scores(task.adapter, scaled, unit, "l2")


def by_product(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Sum of |gradient x weight|: a first-order estimate of the effect of removing each weight."""
    weights, gradients = task.adapter.weights(), _target_gradients(task)
    products = [grad * weight.values for grad, weight in zip(gradients, weights, strict=True)]
    return pool_scores(task.adapter, products, unit, "sum")


def oracle(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Norm of the change that planting made to the unit's weights."""
    if task.planted is None:
        raise InputError("planted", "None", "the oracle needs the truth")
    deltas = scatter_planted(task.adapter, task.planted, task.planted.deltas)
    return pool_scores(task.adapter, deltas, unit, "l2")


def by_norm(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Norm of the unit's weights, as no text can tell."""
    weights = [weight.values.detach() for weight in task.adapter.weights()]
    return pool_scores(task.adapter, weights, unit, "l2")


def by_norm_in_layer(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Distance of that norm from the mean of its layer, relative to the mean.

    Single weights are compared with all weights.
    """
    norms = by_norm(task, unit)
    by_layer = norms.view(1 if unit == "weight" else task.adapter.n_layers, -1)
    mean = by_layer.mean(-1, keepdim=True)
    return ((by_layer - mean).abs() / mean).flatten()


def random_scores(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Uniform random scores."""
    weights = [weight.values for weight in task.adapter.weights()]
    n_units = len(pool_scores(task.adapter, weights, unit, "max"))
    # The planted place may have been drawn from the task's seed, so these scores need another
    # stream. (Generators on the CPU read only the lower 32 bits of a seed.)
    generator = torch.Generator().manual_seed(2**32 - 1 - task.seed)
    return torch.rand(n_units, generator=generator)
