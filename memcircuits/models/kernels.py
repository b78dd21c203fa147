"""The same functions in fewer steps, for as long as an analysis runs.

Models spell out functions for which torch has one kernel: GELU's tanh form in eight passes over
memory, the LayerNorm of a `TransformerBridge` in nine (it has a hook on every part). And on CPUs
the product with an unembedding matrix, whose number of rows is often odd (50,257), runs at half of
the rate of other products unless it is done in blocks of rows. On CPUs this is a fifth of an
analysis, and no number changes by more than rounding. Each replacement is tried on a few numbers
first and used only where it answers the same; a norm whose inner hooks are in use keeps its steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Tensor]


_BLOCK = 1024  # rows of the unembedding


def fused_forwards(model: Any) -> list[tuple[nn.Module, Forward]]:
    """Modules of a model and what can stand in for their `forward`."""
    found: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        kind = type(module).__name__
        if kind == "NewGELUActivation":
            found.append((module, partial(nn.functional.gelu, approximate="tanh")))
        elif kind == "NormalizationBridge" and isinstance(module.original_component, nn.LayerNorm):
            found.append((module, _norm(module)))
    unembed = getattr(getattr(model, "unembed", None), "original_component", None)
    if type(unembed) is nn.Linear and unembed.weight.device.type == "cpu":
        found.append((unembed, partial(_blocks, unembed)))
    return [(module, quick) for module, quick in found if _same(module, quick)]


@contextlib.contextmanager
def patched_forwards(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Inside, modules use the forwards given; those that have one of their own already keep it."""
    # Past `__setattr__`: a Bridge component hands attributes on to the module it wraps.
    mine = [(vars(module), quick) for module, quick in forwards if "forward" not in vars(module)]
    try:
        for owner, quick in mine:
            owner["forward"] = quick
        yield
    finally:
        for owner, _ in mine:
            owner.pop("forward", None)


def _norm(norm: Any) -> Forward:
    """A Bridge's LayerNorm in one kernel, unless somebody listens to the parts of it."""
    plain = norm.forward
    inner = (norm.hook_scale, norm.hook_normalized)
    eps = getattr(norm.config, "eps", 1e-5)

    def forward(x: Tensor, **options: Any) -> Tensor:
        weight, bias = norm.weight, norm.original_component.bias
        folded = norm.use_native_layernorm_autograd or getattr(
            norm.config, "layer_norm_folding", False
        )
        listened = any(h._forward_hooks or h._backward_hooks or h._forward_pre_hooks for h in inner)
        if folded or listened or not x.dtype == weight.dtype == torch.float32:
            return plain(x, **options)
        return norm.hook_out(
            nn.functional.layer_norm(norm.hook_in(x), x.shape[-1:], weight, bias, eps)
        )

    return forward


def _blocks(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)`, a block of the answer's last axis at a time."""
    weights = linear.weight.split(_BLOCK)
    biases = [None] * len(weights) if linear.bias is None else linear.bias.split(_BLOCK)
    return torch.cat(
        [nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1
    )


def _same(module: Any, quick: Forward) -> bool:
    """Whether both answer the same to some numbers."""
    weight = getattr(module, "weight", None)
    size = 8 if weight is None else weight.shape[-1]
    x = torch.linspace(-3, 3, 2 * size).view(1, 2, size)
    if weight is not None:
        x = x.to(weight)
    try:
        with torch.no_grad():
            expected, found = module.forward(x), quick(x)
    except (TypeError, RuntimeError, AttributeError):
        return False
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
