"""Localizers that multiply the activation of every head, MLP or neuron by a gate.

A gate of 1 leaves a unit as it is, a gate of 0 removes its output. Attribution is the first-order
estimate of the rise of the NLL when one gate closes (targets minus controls);
`log-odds-attribution` is the same of the fall of log(p / (1 - p)), which still has a slope where a
recited token's p is near 1 and its NLL is flat; `attn-lrp` is the relevance of a unit for the true
tokens' logits (`memcircuits.benchmark.relevance`). Integrated gradients
(Sundararajan et al. 2017) average that estimate over the way from all gates closed to all open;
hard concrete gates (Louizos et al. 2018) are trained to convergence, in 100 steps, to close the
half of the units that the continuation needs least, once for the targets and once for the controls
(Chang et al. 2024 train such gates for neurons, in up to 4,000 epochs). `activation-gradient` has
no gates: it reads the largest gradient in a unit's activation at any position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.benchmark.relevance import attn_lrp
from memcircuits.benchmark.units import LocalizationTask, Unit
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.gradients.activations import activation_gradients
from memcircuits.evidence.subnetworks.hard_concrete import initial_log_odds, train_gates
from memcircuits.evidence.subnetworks.mean_ablation import GatedSite, MeanAblation
from memcircuits.measure.continuation import (
    Measured,
    continuation_logits,
    harm,
    score_continuation,
)
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import ActivationEdit, hook_name

_IG_STEPS = 8  # of integrated gradients


_SITES: dict[Unit, tuple[GatedSite, ...]] = {
    "head": ("z",),
    "component": ("z", "mlp_out"),
    "neuron": ("post",),
}


def _places(adapter: Adapter, unit: Unit) -> list[tuple[GatedSite, int]]:
    """What is gated, in the order of the scores: sites, and within them layers."""
    return [(site, layer) for site in _SITES[unit] for layer in range(adapter.n_layers)]


def _open_gates(adapter: Adapter, unit: Unit) -> list[Float[Tensor, " unit"]]:
    """Gates of 1 for the units of each place."""
    sizes = [
        {"z": adapter.n_heads, "mlp_out": 1}.get(site)
        or adapter.weight(layer, "W_out").values.shape[1]
        for site, layer in _places(adapter, unit)
    ]
    return [torch.ones(n, device=adapter.device, dtype=adapter.dtype) for n in sizes]


Measure: TypeAlias = Callable[
    [Float[Tensor, "paragraph pos d_vocab"], Int[Tensor, "paragraph pos"]],
    Float[Tensor, " paragraph"],
]
"""A number for each paragraph from the logits and the true tokens of its continuation."""


_nll: Measure = partial(harm, "nll")


def _minus_logit(
    logits: Float[Tensor, "paragraph pos d_vocab"], tokens: Int[Tensor, "paragraph pos"]
) -> Float[Tensor, " paragraph"]:
    return -logits.float().gather(-1, tokens[..., None])[..., 0].mean(-1)


def _gated(
    adapter: Adapter,
    paragraphs: Paragraphs,
    unit: Unit,
    gates: Sequence[Float[Tensor, " unit"]],
    measure: Measure,
    rules: Mapping[str, ActivationEdit],
) -> Float[Tensor, ""]:
    """Mean of a measure with every unit's activation multiplied by its gate.

    `rules` are edits of activations, made before the gates.
    """

    def multiply(site: GatedSite, layer: int, gate: Float[Tensor, " unit"]) -> ActivationEdit:
        shape = (1, 1, -1, 1) if site == "z" else (1, 1, -1)
        rule = rules.get(hook_name(site, layer), lambda activation: activation)
        return lambda activation: rule(activation) * gate.view(shape)

    edit = dict(rules)
    for (site, layer), gate in zip(_places(adapter, unit), gates, strict=True):
        edit[hook_name(site, layer)] = multiply(site, layer, gate)
    logits = continuation_logits(adapter, paragraphs, edit=edit)
    return measure(logits, paragraphs.continuation.to(logits.device)).mean()


def _gate_gradient(
    task: LocalizationTask,
    paragraphs: Paragraphs,
    unit: Unit,
    *,
    openness: float = 1.0,
    measure: Measure = _nll,
    rules: Mapping[str, ActivationEdit] | None = None,
) -> Float[Tensor, " unit"]:
    """Gradient of a measure in every gate, at gates that all equal `openness`."""
    gates = [(gate * openness).requires_grad_() for gate in _open_gates(task.adapter, unit)]
    with task.adapter.preserving_state(), torch.enable_grad():
        mean = _gated(task.adapter, paragraphs, unit, gates, measure, rules or {})
        return torch.cat(torch.autograd.grad(mean, gates))


def by_attribution(
    measured: Measured, task: LocalizationTask, unit: Unit
) -> Float[Tensor, " unit"]:
    """Estimated harm when a gate closes, of the targets minus of the controls."""
    measure = partial(harm, measured)
    # Closing a gate changes it by -1, which turns targets - controls around.
    on_control = _gate_gradient(task, task.control, unit, measure=measure)
    return on_control - _gate_gradient(task, task.targets, unit, measure=measure)


def by_relevance(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Relevance for the true tokens' logits, of the targets minus of the controls (AttnLRP)."""
    with attn_lrp(task.adapter) as rules:
        on_targets, on_control = (
            _gate_gradient(task, paragraphs, unit, measure=_minus_logit, rules=rules)
            for paragraphs in (task.targets, task.control)
        )
    return on_control - on_targets


def by_integrated_gradients(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """The targets' gradient in the gates, averaged from all closed to all open (midpoint rule)."""
    levels = [(i + 0.5) / _IG_STEPS for i in range(_IG_STEPS)]
    gradients = [_gate_gradient(task, task.targets, unit, openness=level) for level in levels]
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

    edit = {hook_name("post", layer): add(layer) for layer in range(adapter.n_layers)}
    with adapter.preserving_state(), torch.enable_grad():
        nll = score_continuation(adapter, targets, edit=edit).nll.mean()
        grads = torch.autograd.grad(nll, shifts)
    return torch.cat([grad.abs().amax((0, 1)) for grad in grads])


def by_hard_concrete(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Log-odds of gates that keep half of the units, trained on the targets minus on the controls.

    A closed gate puts the unit's mean over the controls in its place. Both masks are trained to
    convergence (`STEPS` steps, a paragraph at each); a unit that every text needs stays open in
    both.
    """
    adapter, generator = task.adapter, task.generator
    sets = (task.targets, task.control)
    with adapter.preserving_state():
        ablation = MeanAblation(adapter, task.control, _SITES[unit])

        def loss(gates: Float[Tensor, "set unit"]) -> Float[Tensor, " set"]:
            nll = []
            for paragraphs, gate in zip(sets, gates, strict=True):
                row = torch.randint(len(paragraphs), (1,), generator=generator)
                nll.append(ablation.score(paragraphs, row, gate[None]).nll)
            return torch.cat(nll)

        start = initial_log_odds(len(sets), ablation.n_gates, generator, adapter.device)
        on_targets, on_controls = train_gates(loss, start, 0.5, generator)
    return on_targets - on_controls
