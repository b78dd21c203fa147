"""The same functions in fewer steps, for as long as an analysis runs.

Models spell out functions for which torch has one kernel: the tanh form of GELU in eight passes
over memory, the LayerNorm of a `TransformerBridge` in nine (it has a hook on every part). And on
CPUs the product with an unembedding matrix, whose number of rows is often odd (50,257), runs at
half the rate of other products unless it is computed in blocks of rows. Together these savings are
a fifth of an analysis on CPUs, and no number changes by more than rounding.

A replacement is used only where it gives the same values as the module on a few numbers, and a norm
keeps its steps while there are hooks on its parts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Forward: TypeAlias = Callable[..., Tensor]

BLOCK = 1024
"""Rows of the unembedding matrix per block."""

_GELU_BLOCK = 2**17  # numbers, 512 KiB in float32
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def fused_forwards(model: Any) -> list[tuple[nn.Module, Forward]]:
    """Modules of a model, each with a quicker function that can replace its `forward`."""
    candidates: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        kind = type(module).__name__
        if kind == "NewGELUActivation":
            candidates.append((module, tanh_gelu))
        elif kind == "NormalizationBridge" and isinstance(module.original_component, nn.LayerNorm):
            candidates.append((module, _fused_norm(module)))
    unembed = getattr(getattr(model, "unembed", None), "original_component", None)
    if type(unembed) is nn.Linear and unembed.weight.device.type == "cpu":
        candidates.append((unembed, partial(linear_in_blocks, unembed)))
    return [(module, forward) for module, forward in candidates if _agrees(module, forward)]


@contextlib.contextmanager
def patched_forwards(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Inside, modules use the forwards given; a module whose forward was replaced before keeps it.

    So nesting is safe: only the outermost context installs and removes a forward.
    """
    # Past `__setattr__`: a Bridge component hands attributes on to the module it wraps.
    free = [
        (vars(module), forward) for module, forward in forwards if "forward" not in vars(module)
    ]
    try:
        for attributes, forward in free:
            attributes["forward"] = forward
        yield
    finally:
        for attributes, _ in free:
            attributes.pop("forward", None)


def linear_in_blocks(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)`, computed for one block of output features at a time."""
    weights = linear.weight.split(BLOCK)
    biases = [None] * len(weights) if linear.bias is None else linear.bias.split(BLOCK)
    return torch.cat(
        [nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1
    )


def tanh_gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).

    On CPUs, where torch's kernel is slow, the sigmoid is computed in blocks that stay in the cache.
    """
    if x.requires_grad or x.device.type != "cpu" or x.dtype != torch.float32:
        return nn.functional.gelu(x, approximate="tanh")
    x = x.contiguous()
    result = torch.empty_like(x)
    parts, outs = (tensor.view(-1).split(_GELU_BLOCK) for tensor in (x, result))
    for part, out in zip(parts, outs, strict=True):
        torch.mul(part, part, out=out)
        out.mul_(0.044715 * _GELU_SLOPE).add_(_GELU_SLOPE).mul_(part).sigmoid_().mul_(part)
    return result


def _fused_norm(norm: Any) -> Forward:
    """A Bridge's LayerNorm in one kernel, unless there are hooks on its parts."""
    stepwise = norm.forward
    inner_points = (norm.hook_scale, norm.hook_normalized)
    eps = getattr(norm.config, "eps", 1e-5)

    def forward(x: Tensor, **options: Any) -> Tensor:
        weight, bias = norm.weight, norm.original_component.bias
        folded = norm.use_native_layernorm_autograd or getattr(
            norm.config, "layer_norm_folding", False
        )
        has_hooks = any(
            point._forward_hooks or point._backward_hooks or point._forward_pre_hooks
            for point in inner_points
        )
        if folded or has_hooks or not x.dtype == weight.dtype == torch.float32:
            return stepwise(x, **options)
        return norm.hook_out(
            nn.functional.layer_norm(norm.hook_in(x), x.shape[-1:], weight, bias, eps)
        )

    return forward


def _agrees(module: Any, forward: Forward) -> bool:
    """Whether a module and its replacement give the same values for a few numbers."""
    weight = getattr(module, "weight", None)
    size = 8 if weight is None else weight.shape[-1]
    x = torch.linspace(-3, 3, 2 * size).view(1, 2, size)
    if weight is not None:
        x = x.to(weight)
    try:
        with torch.no_grad():
            expected, replaced = module.forward(x), forward(x)
    except (TypeError, RuntimeError, AttributeError):
        return False
    return bool((replaced - expected).abs().max() <= 1e-5 * expected.abs().max())
