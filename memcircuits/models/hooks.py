"""Names of TransformerLens's activations, and hooks that read or replace them.

TransformerLens names the points of a forward pass where a function may look at an activation or
replace it: `blocks.3.attn.hook_z` is the output of every head of layer 3 before W_O. This package
speaks of *sites*, the last part of such a name, and of layers; `hook_name` is the only place that
puts a name together. The sites of a block, in the order in which they are computed:

    resid_pre        residual stream entering the block      [batch, pos, d_model]
    q, k, v          queries, keys, values of every head     [batch, pos, head, d_head]
    pattern          attention pattern of every head         [batch, head, query, key]
    z                pattern @ v of every head               [batch, pos, head, d_head]
    attn_out         what attention adds to the stream       [batch, pos, d_model]
    resid_mid        residual stream between the two parts   [batch, pos, d_model]
    pre, post        neurons before and after the nonlinearity  [batch, pos, d_mlp]
    mlp_out          what the MLP adds to the stream         [batch, pos, d_model]
    resid_post       residual stream leaving the block       [batch, pos, d_model]

Keys and values have one head per group where heads share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

HeadSite: TypeAlias = Literal["q", "k", "v", "z"]
"""Activations with a head axis and a vector for every head."""

NeuronSite: TypeAlias = Literal["pre", "post"]
"""Activations of the MLP's neurons."""

ResidualSite: TypeAlias = Literal["attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
"""The residual stream, and what a block's two parts add to it."""

Site: TypeAlias = HeadSite | Literal["pattern"] | NeuronSite | ResidualSite

HEAD_SITES: tuple[HeadSite, ...] = get_args(HeadSite)
NEURON_SITES: tuple[NeuronSite, ...] = get_args(NeuronSite)
RESIDUAL_SITES: tuple[ResidualSite, ...] = get_args(ResidualSite)
SITES: tuple[Site, ...] = (*HEAD_SITES, "pattern", *NEURON_SITES, *RESIDUAL_SITES)

ActivationEdit: TypeAlias = Callable[[Tensor], Tensor]
"""From an activation to its replacement."""

Hook: TypeAlias = tuple[str, Callable[..., Any]]
"""Name of an activation, and the function that TransformerLens calls with it."""


def hook_name(site: Site, layer: int) -> str:
    """TransformerLens's name of an activation.

    Example:
        >>> hook_name("z", 3), hook_name("post", 0), hook_name("resid_pre", 1)
        ('blocks.3.attn.hook_z', 'blocks.0.mlp.hook_post', 'blocks.1.hook_resid_pre')
    """
    if site in HEAD_SITES or site == "pattern":
        return f"blocks.{layer}.attn.hook_{site}"
    if site in NEURON_SITES:
        return f"blocks.{layer}.mlp.hook_{site}"
    return f"blocks.{layer}.hook_{site}"


def editing_hooks(edit: Mapping[str, ActivationEdit] | None, home: torch.device) -> list[Hook]:
    """Hooks that replace activations, by name.

    The functions are given activations on the device `home`, also if a model is split over several.
    """

    def replacing(function: ActivationEdit) -> Callable[..., Tensor]:
        def replace(tensor: Tensor, hook: Any = None) -> Tensor:
            return function(tensor.to(home)).to(tensor.device)

        return replace

    return [(name, replacing(function)) for name, function in (edit or {}).items()]


def reading_hooks(names: Sequence[str], cache: dict[str, Tensor], home: torch.device) -> list[Hook]:
    """Hooks that put activations into `cache`, by name, on the device `home`."""

    def keeping(name: str) -> Callable[..., None]:
        def keep(tensor: Tensor, hook: Any = None) -> None:
            cache[name] = tensor.to(home)

        return keep

    return [(name, keeping(name)) for name in names]


@contextlib.contextmanager
def hooked(model: Any, hooks: Sequence[Hook]) -> Iterator[None]:
    """Inside, the hooks act on a TransformerLens model."""
    if not hooks:
        yield
        return
    with model.hooks(fwd_hooks=list(hooks)):
        yield


@contextlib.contextmanager
def unembedding_only(model: Any, positions: slice) -> Iterator[None]:
    """Inside, the model unembeds these positions and returns the logits of no others."""
    if positions == slice(None):
        yield
        return

    def cut(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0][:, positions], *arguments[1:])

    handle = model.unembed.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
