"""Localizers that multiply the activation of every head or neuron by a gate.

A gate of 1 leaves a unit as it is, a gate of 0 removes its output. Attribution is the first-order
estimate of the rise of the NLL when one gate closes (targets minus controls); integrated gradients
(Sundararajan et al. 2017) average that estimate over the way from all gates closed to all open;
hard concrete gates (Louizos et al. 2018) are trained to close unless the recitation needs them, as
Chang et al. (2024) do for neurons. `activation-gradient` has no gates: it reads the largest
gradient in a unit's activation at any position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.benchmark.units import LocalizationTask, Unit
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.gradients.activations import activation_gradients
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name

_IG_STEPS = 8  # of integrated gradients
_MASK_STEPS = 40  # of training hard concrete gates
# The hard concrete distribution: temperature, and the interval that the sigmoid is stretched to.
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1


def _hook_name(unit: Unit, layer: int) -> str:
    return hook_name("z" if unit == "head" else "post", layer)


def _open_gates(adapter: Adapter, unit: Unit) -> list[Float[Tensor, " unit"]]:
    """Gates of 1 for the heads or neurons of each layer."""
    sizes = [
        adapter.n_heads if unit == "head" else adapter.weight(layer, "W_out").values.shape[1]
        for layer in range(adapter.n_layers)
    ]
    return [torch.ones(n, device=adapter.device, dtype=adapter.dtype) for n in sizes]


def _gated_nll(
    adapter: Adapter, paragraphs: Paragraphs, unit: Unit, gates: Sequence[Float[Tensor, " unit"]]
) -> Float[Tensor, ""]:
    """Mean NLL (nats/token) with every unit's activation multiplied by its gate."""

    def multiply(layer: int) -> Callable[[Tensor], Tensor]:
        shape = (1, 1, -1, 1) if unit == "head" else (1, 1, -1)
        return lambda activation: activation * gates[layer].view(shape)

    edit = {_hook_name(unit, layer): multiply(layer) for layer in range(adapter.n_layers)}
    return score_continuation(adapter, paragraphs, edit=edit).nll.mean()


def _gate_gradient(
    task: LocalizationTask, paragraphs: Paragraphs, unit: Unit, openness: float
) -> Float[Tensor, " unit"]:
    """Gradient of the mean NLL in every gate, at gates that all equal `openness`."""
    gates = [(gate * openness).requires_grad_() for gate in _open_gates(task.adapter, unit)]
    with task.adapter.preserving_state(), torch.enable_grad():
        nll = _gated_nll(task.adapter, paragraphs, unit, gates)
        return torch.cat(torch.autograd.grad(nll, gates))


def by_attribution(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Estimated rise of the NLL when a gate closes, of the targets minus of the controls."""
    # Closing a gate changes it by -1, which turns targets - controls around.
    on_control = _gate_gradient(task, task.control, unit, 1.0)
    return on_control - _gate_gradient(task, task.targets, unit, 1.0)


def by_integrated_gradients(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """The targets' gradient in the gates, averaged from all closed to all open (midpoint rule)."""
    levels = [(i + 0.5) / _IG_STEPS for i in range(_IG_STEPS)]
    gradients = [_gate_gradient(task, task.targets, unit, level) for level in levels]
    return -torch.stack(gradients).mean(0)


def by_activation_gradient(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Largest absolute gradient of the targets' NLL in a unit's activation at any position."""
    if unit == "head":
        gradients = activation_gradients(task.model, task.targets, sites=("z",), progress=False)
        return gradients.values["z"].amax(-1)
    adapter, targets = task.adapter, task.targets
    shape = (len(targets), targets.inputs.shape[1] - 1, -1)
    # Adding zeros changes nothing; the gradient in the zeros is that in the activation.
    shifts = [
        torch.zeros(1, 1, len(gate), device=gate.device, dtype=gate.dtype)
        .expand(shape)
        .clone()
        .requires_grad_()
        for gate in _open_gates(adapter, unit)
    ]

    def add(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda activation: activation + shifts[layer]

    edit = {_hook_name(unit, layer): add(layer) for layer in range(adapter.n_layers)}
    with adapter.preserving_state(), torch.enable_grad():
        nll = score_continuation(adapter, targets, edit=edit).nll.mean()
        grads = torch.autograd.grad(nll, shifts)
    return torch.cat([grad.abs().amax((0, 1)) for grad in grads])


def by_hard_concrete(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Log-odds of gates that are trained to stay open only where the recitation needs them."""
    adapter, generator = task.adapter, task.generator
    sizes = [len(gate) for gate in _open_gates(adapter, unit)]
    log_odds = torch.full((sum(sizes),), 2.0, device=adapter.device, requires_grad=True)
    adam = torch.optim.Adam([log_odds], lr=0.1)
    # sigmoid(log_odds - threshold) is the probability that a gate is not exactly 0.
    threshold = _BETA * torch.log(torch.tensor(-_LOW / _HIGH))
    with adapter.preserving_state():
        for _ in range(_MASK_STEPS):
            u = torch.rand(len(log_odds), generator=generator)
            u = u.clamp(1e-6, 1 - 1e-6).to(log_odds.device)
            with torch.enable_grad():
                concrete = torch.sigmoid((u.log() - (1 - u).log() + log_odds) / _BETA)
                gates = (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1).to(adapter.dtype)
                nll = _gated_nll(adapter, task.targets, unit, gates.split(sizes))
                loss = nll + torch.sigmoid(log_odds - threshold).mean()
                log_odds.grad = torch.autograd.grad(loss, log_odds)[0]
            adam.step()
    return log_odds.detach()
