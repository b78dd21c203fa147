"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memcircuits.benchmark.units import LocalizationTask
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.gradients.activations import activation_gradients
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name

_IG_STEPS = 8


_MASK_STEPS = 40


def _site(unit: str, layer: int) -> str:
    return hook_name("z" if unit == "head" else "post", layer)


def _gates(adapter: Adapter, unit: str) -> list[Tensor]:
    """One gate per head or neuron, open."""
    sizes = [
        adapter.n_heads if unit == "head" else adapter.weight(i, "W_out").values.shape[1]
        for i in range(adapter.n_layers)
    ]
    return [torch.ones(n, device=adapter.device, dtype=adapter.dtype) for n in sizes]


def _gated(adapter: Adapter, paragraphs: Paragraphs, unit: str, gates: Sequence[Tensor]) -> Tensor:
    """Mean NLL (nats/token) with every unit's activation multiplied by its gate."""

    def gate(layer: int) -> Callable[[Tensor], Tensor]:
        shape = (1, 1, -1, 1) if unit == "head" else (1, 1, -1)
        return lambda old: old * gates[layer].view(shape)

    edits = {_site(unit, layer): gate(layer) for layer in range(adapter.n_layers)}
    return score_continuation(adapter, paragraphs, edit=edits).nll.mean()


def _gate_gradient(
    case: LocalizationTask, paragraphs: Paragraphs, unit: str, openness: float
) -> Tensor:
    """Gradient of the NLL in every gate, all of them open by `openness`."""
    gates = [(g * openness).requires_grad_() for g in _gates(case.adapter, unit)]
    with case.adapter.preserving_state(), torch.enable_grad():
        loss = _gated(case.adapter, paragraphs, unit, gates)
        return torch.cat(torch.autograd.grad(loss, gates))


def by_attribution(case: LocalizationTask, unit: str) -> Tensor:
    # Closing a gate changes it by -1.
    return _gate_gradient(case, case.control, unit, 1.0) - _gate_gradient(
        case, case.targets, unit, 1.0
    )


def by_integrated_gradients(case: LocalizationTask, unit: str) -> Tensor:
    points = [(i + 0.5) / _IG_STEPS for i in range(_IG_STEPS)]
    return -torch.stack([_gate_gradient(case, case.targets, unit, p) for p in points]).mean(0)


def by_activation_gradient(case: LocalizationTask, unit: str) -> Tensor:
    if unit == "head":
        found = activation_gradients(case.model, case.targets, sites=("z",), progress=False)
        return found.values["z"].amax(-1)
    slopes: list[Tensor] = []
    zeros = [
        torch.zeros(1, 1, len(g), device=g.device, dtype=g.dtype)
        for g in _gates(case.adapter, unit)
    ]
    n_pos = case.targets.ids.shape[1] - 1
    shifts = [
        z.expand(len(case.targets), n_pos, -1).clone().requires_grad_()  # one per position
        for z in zeros
    ]

    def shift(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda old: old + shifts[layer]

    with case.adapter.preserving_state(), torch.enable_grad():
        edits = {_site(unit, i): shift(i) for i in range(case.adapter.n_layers)}
        loss = score_continuation(case.adapter, case.targets, edit=edits).nll.mean()
        slopes += torch.autograd.grad(loss, shifts)
    return torch.cat([s.abs().amax((0, 1)) for s in slopes])


def by_hard_concrete(case: LocalizationTask, unit: str) -> Tensor:
    """Log-odds of gates trained to stay open only where the recitation needs them."""
    adapter, generator = case.adapter, case.generator
    sizes = [len(g) for g in _gates(adapter, unit)]
    odds = torch.full((sum(sizes),), 2.0, device=adapter.device, requires_grad=True)
    adam = torch.optim.Adam([odds], lr=0.1)
    beta, low, high = 2 / 3, -0.1, 1.1
    closed = beta * torch.log(torch.tensor(-low / high))
    with adapter.preserving_state():
        for _ in range(_MASK_STEPS):
            u = torch.rand(len(odds), generator=generator).clamp(1e-6, 1 - 1e-6).to(odds.device)
            with torch.enable_grad():
                soft = torch.sigmoid((u.log() - (1 - u).log() + odds) / beta)
                gate = (soft * (high - low) + low).clamp(0, 1).to(adapter.dtype)
                nll = _gated(adapter, case.targets, unit, gate.split(sizes))
                loss = nll + torch.sigmoid(odds - closed).mean()
                odds.grad = torch.autograd.grad(loss, odds)[0]
            adam.step()
    return odds.detach()
