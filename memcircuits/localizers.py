"""Many methods, one signature: which parts of the model hold these paragraphs?

A localizer takes a `Case` (a model, target paragraphs, controls) and answers one score per unit,
larger for parts that it blames more. Units are *heads*, *blocks* (a layer's attention or MLP), MLP
*neurons* and single *weights*. Where a method can tell targets from controls, the score is the
difference: what harms every paragraph alike is not where these are kept.

| family | localizers |
| --- | --- |
| gradients of weights | `gradient-max` (the paper), `gradient-mean`, `gradient-l2`,
  `gradient-fisher` (with the controls' curvature, `memcircuits.gradients`), `gradient-x-weight` |
| gradients of activations | `activation-gradient`, `attribution`, `integrated-gradients` |
| ablation | `zero-ablation`, `mean-ablation`, `resample-ablation` |
| patching against perturbed twins | `exact-patching`, `attribution-patching` |
| attention | `rare-token-attention` |
| learned | `hard-concrete`: a sparse mask of units that keeps the recitation (Louizos et al. 2018,
  as used by Chang et al. 2024) |
| bounds | `oracle` (what planting changed) and `random` |

`memcircuits.localization` scores them on planted paragraphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.ablation import Ablation
from memcircuits.activations import activation_gradients
from memcircuits.adapter import HEAD_COMPONENTS, Adapter, adapt, hook_z
from memcircuits.attention import rare_token_attention
from memcircuits.checks import InputError, one_of
from memcircuits.engine import HeadEdit, Restart
from memcircuits.gradients import all_weights, damped_root, fisher_diagonal, mean_gradient
from memcircuits.measure import read_continuation
from memcircuits.paragraphs import Paragraphs
from memcircuits.patching import patch_heads
from memcircuits.planting import Planted
from memcircuits.unigrams import UnigramTable

UNITS = ("head", "block", "neuron", "weight")
_TWINS = 3  # perturbed twins of each target
_PERTURBED = 0.2  # of a twin's prefix tokens
_IG_STEPS = 8
_MASK_STEPS = 40


@dataclass(frozen=True)
class Case:
    """What a localizer is given.

    Attributes:
        model: HookedTransformer or TransformerBridge.
        targets: the paragraphs whose place is sought.
        control: other paragraphs, at least two.
        unigrams: token counts, for `rare-token-attention`.
        seed: of all draws.
        planted: the truth; only `oracle` looks at it.
    """

    model: Any
    targets: Paragraphs
    control: Paragraphs
    unigrams: UnigramTable | None = None
    seed: int = 0
    planted: Planted | None = None

    @cached_property
    def adapter(self) -> Adapter:
        """The model's adapter."""
        return adapt(self.model)

    @property
    def generator(self) -> torch.Generator:
        """A generator at the case's seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Localizer:
    """A method.

    Attributes:
        name: what it is called.
        units: the units that it can score.
        score: from a case and a unit to one score per unit, flat (see `size`).
    """

    name: str
    units: tuple[str, ...]
    score: Callable[[Case, str], Float[Tensor, " unit"]]


def localize(case: Case, name: str, unit: str = "head") -> Float[Tensor, " unit"]:
    """Run one localizer.

    Args:
        case: model and paragraphs.
        name: of the localizer (`LOCALIZERS`).
        unit: `head` ([layer, head] flattened), `block` (each layer's attention, then its MLP),
            `neuron` (layer by layer) or `weight` (matrix by matrix, as `gradients.all_weights`).

    Raises:
        InputError: for an unknown name, or a unit that it cannot score.
    """
    one_of("localizer", name, LOCALIZERS)
    one_of("unit", unit, UNITS)
    if unit not in LOCALIZERS[name].units:
        able = [n for n, found in LOCALIZERS.items() if unit in found.units]
        raise InputError("unit", repr(unit), f"{name} cannot score it; {', '.join(able)} can")
    return LOCALIZERS[name].score(case, unit).detach().float().cpu().flatten()


def truth_of(adapter: Adapter, planted: Planted, unit: str) -> Tensor:
    """Which units hold a written weight, boolean, in the order of `localize`."""
    changed = []
    for weight in all_weights(adapter):
        mask = torch.zeros(weight.values.numel())
        name = f"{weight.layer}.{weight.component}"
        if name in planted.indices:
            mask[planted.indices[name]] = 1
        changed.append(mask.view(weight.values.shape))
    found = pool(adapter, changed, unit, "max") > 0
    if unit == "head" and planted.truth.heads:  # not those that share a key-value head
        found = torch.zeros_like(found)
        for head in planted.truth.heads:
            found[head.layer * adapter.n_heads + head.head] = True
    if unit == "neuron":  # all of a neuron's matrices, not one of its weights
        found = pool(adapter, changed, unit, "mean") > 0.99
    return found


def pool(
    adapter: Adapter, scores: Sequence[Float[Tensor, "head d_in d_out"]], unit: str, how: str
) -> Float[Tensor, " unit"]:
    """Pool |score| of single weights over the weights of each unit: `max`, `mean`, `l2` or `sum`.

    Args:
        adapter: the model.
        scores: one tensor for each of `gradients.all_weights`, as `Weight.split` views it.
        unit: see `localize`.
        how: over all the unit's weights together.
    """
    if unit == "weight":
        return torch.cat([s.abs().flatten().cpu() for s in scores])
    groups: dict[int, list[tuple[str, Tensor]]] = {i: [] for i in range(adapter.n_layers)}
    for weight, score in zip(all_weights(adapter), scores, strict=True):
        groups[weight.layer].append((weight.component, score.abs().float().cpu()))
    rows = []
    for layer in groups.values():
        heads = [
            s.repeat_interleave(adapter.n_heads // s.shape[0], 0).flatten(1)
            for component, s in layer
            if component in HEAD_COMPONENTS
        ]
        mlp = [
            (s[0] if component == "W_out" else s[0].T)
            for component, s in layer
            if component not in HEAD_COMPONENTS
        ]
        if unit == "head":
            rows.append(_pooled(torch.cat(heads, 1), how))
        elif unit == "neuron":
            rows.append(_pooled(torch.cat(mlp, 1), how))
        else:
            both = [torch.cat([m.flatten() for m in part])[None] for part in (heads, mlp)]
            rows += [_pooled(part, how) for part in both]
    return torch.cat(rows)


def _pooled(values: Float[Tensor, "unit weight"], how: str) -> Float[Tensor, " unit"]:
    if how == "l2":
        return values.square().sum(-1).sqrt()
    if how == "max":
        return values.amax(-1)
    return values.sum(-1) if how == "sum" else values.mean(-1)


@contextlib.contextmanager
def counting(adapter: Adapter) -> Iterator[dict[str, float]]:
    """Count the work done inside, in forward passes of one paragraph (`cost["forwards"]`).

    A block run on one row is 1 / n_layers of a pass; with gradients on it counts three times, for
    the backward pass that follows.
    """
    cost = {"forwards": 0.0}
    part = 1 / adapter.n_layers

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cost["forwards"] += part * hidden.shape[0] * (3 if torch.is_grad_enabled() else 1)

    handles = [b.register_forward_pre_hook(count, with_kwargs=True) for b in adapter.model.blocks]
    try:
        yield cost
    finally:
        for handle in handles:
            handle.remove()


# -- weights ------------------------------------------------------------------------------------


def _gradient(case: Case) -> list[Tensor]:
    weights = all_weights(case.adapter)
    _, gradients = mean_gradient(case.adapter, case.targets, weights, None, False)
    return [w.split(g) for w, g in zip(weights, gradients, strict=True)]


def _by_gradient(how: str, case: Case, unit: str) -> Tensor:
    return pool(case.adapter, _gradient(case), unit, how)


def _by_fisher(case: Case, unit: str) -> Tensor:
    weights = all_weights(case.adapter)
    fisher = fisher_diagonal(case.adapter, case.control, weights, 2, case.generator)
    roots = [w.split(r) for w, r in zip(weights, damped_root(fisher), strict=True)]
    scores = [g / root for g, root in zip(_gradient(case), roots, strict=True)]
    return pool(case.adapter, scores, unit, "l2")


def _by_product(case: Case, unit: str) -> Tensor:
    weights = all_weights(case.adapter)
    scores = [g * w.values for g, w in zip(_gradient(case), weights, strict=True)]
    return pool(case.adapter, scores, unit, "sum")


def _oracle(case: Case, unit: str) -> Tensor:
    if case.planted is None:
        raise InputError("planted", "None", "the oracle needs the truth")
    scores = []
    for weight in all_weights(case.adapter):
        change = torch.zeros(weight.values.numel())
        name = f"{weight.layer}.{weight.component}"
        if name in case.planted.indices:
            change[case.planted.indices[name]] = case.planted.deltas[name].float()
        scores.append(change.view(weight.values.shape))
    return pool(case.adapter, scores, unit, "l2")


def _random(case: Case, unit: str) -> Tensor:
    n = len(pool(case.adapter, [w.values for w in all_weights(case.adapter)], unit, "max"))
    # A stream of its own: the place that was written may come from the same seed. (Generators on
    # the CPU look at the lower 32 bits of a seed only.)
    return torch.rand(n, generator=torch.Generator().manual_seed(2**32 - 1 - case.seed))


# -- gates on activations -----------------------------------------------------------------------


def _site(unit: str, layer: int) -> str:
    return hook_z(layer) if unit == "head" else f"blocks.{layer}.mlp.hook_post"


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

    run = adapter.run(
        paragraphs.ids[:, :-1],
        positions=slice(paragraphs.n_prefix - 1, None),
        edit={_site(unit, layer): gate(layer) for layer in range(adapter.n_layers)},
    )
    return read_continuation(run.logits, paragraphs.continuation.to(adapter.device)).nll.mean()


def _gate_gradient(case: Case, paragraphs: Paragraphs, unit: str, openness: float) -> Tensor:
    """Gradient of the NLL in every gate, all of them open by `openness`."""
    gates = [(g * openness).requires_grad_() for g in _gates(case.adapter, unit)]
    with case.adapter.untouched(), torch.enable_grad():
        loss = _gated(case.adapter, paragraphs, unit, gates)
        return torch.cat(torch.autograd.grad(loss, gates))


def _by_attribution(case: Case, unit: str) -> Tensor:
    # Closing a gate changes it by -1.
    return _gate_gradient(case, case.control, unit, 1.0) - _gate_gradient(
        case, case.targets, unit, 1.0
    )


def _by_integrated_gradients(case: Case, unit: str) -> Tensor:
    points = [(i + 0.5) / _IG_STEPS for i in range(_IG_STEPS)]
    return -torch.stack([_gate_gradient(case, case.targets, unit, p) for p in points]).mean(0)


def _by_activation_gradient(case: Case, unit: str) -> Tensor:
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

    with case.adapter.untouched(), torch.enable_grad():
        run = case.adapter.run(
            case.targets.ids[:, :-1],
            positions=slice(case.targets.n_prefix - 1, None),
            edit={_site(unit, i): shift(i) for i in range(case.adapter.n_layers)},
        )
        targets = case.targets.continuation.to(case.adapter.device)
        loss = read_continuation(run.logits, targets).nll.mean()
        slopes += torch.autograd.grad(loss, shifts)
    return torch.cat([s.abs().amax((0, 1)) for s in slopes])


def _by_hard_concrete(case: Case, unit: str) -> Tensor:
    """Log-odds of gates trained to stay open only where the recitation needs them."""
    adapter, generator = case.adapter, case.generator
    sizes = [len(g) for g in _gates(adapter, unit)]
    odds = torch.full((sum(sizes),), 2.0, device=adapter.device, requires_grad=True)
    adam = torch.optim.Adam([odds], lr=0.1)
    beta, low, high = 2 / 3, -0.1, 1.1
    closed = beta * torch.log(torch.tensor(-low / high))
    with adapter.untouched():
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


# -- interventions ------------------------------------------------------------------------------


def _by_ablation(mode: str, case: Case, unit: str) -> Tensor:
    if unit == "block":
        return _block_effects(case, case.targets) - _block_effects(case, case.control)
    reference = None if mode == "zero" else case.control
    effects = [
        Ablation(case.model, p, mode=mode, reference=reference, seed=case.seed)
        .effects(case.adapter.heads(), progress=False)[..., 0]
        .mean(0)
        for p in (case.targets, case.control)
    ]
    return effects[0] - effects[1]


def _block_effects(case: Case, paragraphs: Paragraphs) -> Tensor:
    """Rise of NLL when a layer's whole attention or MLP is silenced."""
    adapter = case.adapter
    rows = []
    with adapter.untouched():
        restart = Restart(adapter, paragraphs.ids, paragraphs.n_prefix)
        clean = restart.clean()[:, 0].mean()
        for layer in range(adapter.n_layers):
            silent = torch.zeros_like(restart.z[layer][:1, :1])
            edit = HeadEdit(tuple(range(adapter.n_heads)), silent)
            rows.append(restart.edited(layer, [edit])[0, :, 0].mean() - clean)
            name = f"blocks.{layer}.hook_mlp_out"
            source = torch.zeros(
                *restart.inputs.shape, adapter.d_model, dtype=adapter.dtype, device=adapter.device
            )
            everywhere = torch.ones_like(restart.inputs, dtype=torch.bool)[None]
            found = restart.patched(layer, name, source, everywhere)
            rows.append(found[0, :, 0].mean() - clean)
    return torch.stack(rows)


def _twins(case: Case) -> tuple[Paragraphs, Paragraphs]:
    """Each target several times, and as often with some prefix tokens replaced at random."""
    generator = case.generator
    ids = case.targets.ids.repeat(_TWINS, 1)
    n = case.targets.n_prefix
    noise = torch.randint(case.adapter.d_vocab, (len(ids), n), generator=generator)
    chosen = torch.rand(len(ids), n, generator=generator) < _PERTURBED
    twins = ids.clone()
    twins[:, :n] = torch.where(chosen, noise, ids[:, :n])
    return Paragraphs(ids, n), Paragraphs(twins, n)


def _by_patching(method: str, case: Case, unit: str) -> Tensor:
    clean, twins = _twins(case)
    found = patch_heads(
        case.model, clean, twins, method=method, check=4, seed=case.seed, progress=False
    )
    return found.values


def _by_attention(case: Case, unit: str) -> Tensor:
    table = case.unigrams or UnigramTable.from_tokens(
        case.control.ids, case.adapter.d_vocab, source="the controls"
    )
    found = rare_token_attention(case.model, case.targets, table, permutations=1, progress=False)
    return -found.values


LOCALIZERS: Mapping[str, Localizer] = {
    found.name: found
    for found in (
        Localizer("gradient-max", UNITS, partial(_by_gradient, "max")),
        Localizer("gradient-mean", UNITS, partial(_by_gradient, "mean")),
        Localizer("gradient-l2", UNITS, partial(_by_gradient, "l2")),
        Localizer("gradient-fisher", UNITS, _by_fisher),
        Localizer("gradient-x-weight", UNITS, _by_product),
        Localizer("activation-gradient", ("head", "neuron"), _by_activation_gradient),
        Localizer("attribution", ("head", "neuron"), _by_attribution),
        Localizer("integrated-gradients", ("head", "neuron"), _by_integrated_gradients),
        Localizer("hard-concrete", ("head", "neuron"), _by_hard_concrete),
        Localizer("zero-ablation", ("head", "block"), partial(_by_ablation, "zero")),
        Localizer("mean-ablation", ("head",), partial(_by_ablation, "mean")),
        Localizer("resample-ablation", ("head",), partial(_by_ablation, "resample")),
        Localizer("exact-patching", ("head",), partial(_by_patching, "exact")),
        Localizer("attribution-patching", ("head",), partial(_by_patching, "attribution")),
        Localizer("rare-token-attention", ("head",), _by_attention),
        Localizer("oracle", UNITS, _oracle),
        Localizer("random", UNITS, _random),
    )
}
