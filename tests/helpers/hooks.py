"""Activations read and replaced by hand-written hooks, by TransformerLens alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ActivationHook = Callable[..., Tensor | None]
NamedHook = tuple[str, ActivationHook]


def logits_with(model: Any, tokens: Tensor, *hooks: NamedHook) -> Tensor:
    """Logits of a forward pass under hooks."""
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks))


def activations(model: Any, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations of a forward pass, by name."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(names))
    return {name: cache[name].clone() for name in names}


def activation(model: Any, tokens: Tensor, name: str) -> Tensor:
    """One activation of a forward pass."""
    return activations(model, tokens, [name])[name]


def replace_at(positions: Sequence[int], by: Tensor, *, head: int | None = None) -> ActivationHook:
    """Write `by` [batch, pos, ...] into an activation at some positions, of one head or of all."""

    def hook(old: Tensor, hook: Any) -> Tensor:
        new = old.clone()
        axes = (slice(None), list(positions), *([] if head is None else [head]))
        new[axes] = by[axes]
        return new

    return hook


def replace_queries_at(positions: Sequence[int], by: Tensor, *, head: int) -> ActivationHook:
    """Write `by` [batch, head, query, key] into an attention pattern, at some queries of a head."""

    def hook(old: Tensor, hook: Any) -> Tensor:
        new = old.clone()
        new[:, head, list(positions)] = by[:, head, list(positions)]
        return new

    return hook


def replace_by(new: Tensor) -> ActivationHook:
    """Replace an activation entirely."""

    def hook(old: Tensor, hook: Any) -> Tensor:
        return new

    return hook


def record(recorded: list[Tensor]) -> ActivationHook:
    """Append an activation to a list and leave it as it is."""

    def hook(activation: Tensor, hook: Any) -> None:
        recorded.append(activation.clone())

    return hook
