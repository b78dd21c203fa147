"""TODO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.editing.planting import Planted
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from memcircuits.models.weights import HEAD_COMPONENTS

UNITS = ("head", "block", "neuron", "weight")


@dataclass(frozen=True)
class LocalizationTask:
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


def truth_of(adapter: Adapter, planted: Planted, unit: str) -> Tensor:
    """Which units hold a written weight, boolean, in the order of `localize`."""
    changed = []
    for weight in adapter.weights():
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
        scores: one tensor for each of `Adapter.weights`, as `Weight.split` views it.
        unit: see `localize`.
        how: over all the unit's weights together.
    """
    if unit == "weight":
        return torch.cat([s.abs().flatten().cpu() for s in scores])
    groups: dict[int, list[tuple[str, Tensor]]] = {i: [] for i in range(adapter.n_layers)}
    for weight, score in zip(adapter.weights(), scores, strict=True):
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
