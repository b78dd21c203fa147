"""How a module stores the matrix that it applies, found by trying it.

Torch's Linear stores [out, in], transformers' Conv1D [in, out], and a wrapper (LoRA, quantization,
a parametrization) keeps the matrix inside and adds to it. The name of a class says little about
that: a square matrix fits either way round, and a wrapper is none of the known classes. So a
rank-one change u v^T is put in the place of the parameter, for one call of the module. If the
output changes by exactly u (v x), the parameter is [out, in]; if it changes by v (u x), it is
[in, out]. The derivative of the output by the parameter is then that of a plain matrix product,
whatever else the module adds. If neither holds (DoRA rescales the sum, for one), gradients and
edits of the parameter would mean something else, and the module is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memcircuits.base.errors import UnsupportedModel

Layout: TypeAlias = Literal["out in", "in out"]
"""Order of the axes of a stored matrix."""

_TOLERANCE, _TOLERANCE_HALF = 1e-3, 5e-2
_BLOCK = 1024


def unwrapped(module: Any) -> nn.Module | None:
    """The module of transformers inside the components of a Bridge."""
    while module is not None and getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module


def is_plain(module: nn.Module) -> bool:
    """Whether a module holds a weight, perhaps a bias, and nothing that could add to them."""
    names = {name for name, _ in module.named_parameters()}
    return names <= {"weight", "bias"} and not list(module.children())


def stored_matrix(module: Any, owner: str, what: str) -> nn.Parameter:
    """The parameter that holds the matrix of a module.

    Args:
        module: a Linear, Conv1D or a wrapper of one.
        owner: name of the model, for errors.
        what: which matrix of it, for errors.

    Raises:
        UnsupportedModel: if there is none, or none of plain floating-point numbers.
    """
    parameter = getattr(module, "weight", None)
    if not isinstance(parameter, nn.Parameter):
        raise _not_understood(module, owner, what, "holds no matrix of its own")
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        stored = str(parameter.dtype).removeprefix("torch.")
        raise _not_understood(module, owner, what, f"stores it as {stored}")
    if type(parameter.data) is not Tensor:
        raise _not_understood(module, owner, what, f"stores it as {type(parameter.data).__name__}")
    return parameter


def tried_layout(module: nn.Module, parameter: nn.Parameter, owner: str, what: str) -> Layout:
    """How `module` stores its matrix in `parameter`; arguments as for `stored_matrix`.

    Raises:
        UnsupportedModel: if the module does more with the parameter than a matrix product.
    """
    name = next((name for name, p in module.named_parameters() if p is parameter), None)
    if name is not None and parameter.ndim == 2:
        layouts: tuple[Layout, ...] = ("out in", "in out")
        for layout in layouts:
            if _responds(module, name, parameter, layout):
                return layout
    raise _not_understood(module, owner, what, "does more with it than a matrix product")


def _responds(module: nn.Module, name: str, parameter: nn.Parameter, layout: Layout) -> bool:
    """Whether a rank-one change of the parameter changes the output as it would in this layout."""
    stored = parameter.detach()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(size, generator=generator).to(stored) for size in stored.shape)
    size = 10 * float(stored.float().abs().mean().clamp_min(1e-3))
    changed = stored + size * torch.outer(first, second)
    u, v = (first, second) if layout == "out in" else (second, first)
    x = torch.randn(3, len(v), generator=generator).to(stored)
    try:
        with _evaluated(module):
            before = module(x)
            after = torch.func.functional_call(module, {name: changed}, (x,))
    except (RuntimeError, TypeError, ValueError, IndexError):  # of a shape that does not fit
        return False
    expected = size * torch.outer(x.float() @ v.float(), u.float())
    if not isinstance(after, Tensor) or after.shape != expected.shape:
        return False
    full = stored.dtype in (torch.float32, torch.float64)
    largest = (_TOLERANCE if full else _TOLERANCE_HALF) * expected.abs().max()
    return bool((after.float() - before.float() - expected).abs().max() <= largest)


def applied_matrix(
    module: nn.Module, parameter: nn.Parameter, d_in: int
) -> Float[Tensor, "in out"]:
    """What a module multiplies by, with what a wrapper adds: its outputs for unit vectors."""
    with _evaluated(module):
        zero = module(torch.zeros(1, d_in, dtype=parameter.dtype, device=parameter.device))
        unit = torch.eye(d_in, dtype=parameter.dtype, device=parameter.device)
        return torch.cat([module(part) - zero for part in unit.split(_BLOCK)]).to(parameter.dtype)


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Inside, a module has no dropout and no gradients."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _not_understood(module: Any, owner: str, what: str, reason: str) -> UnsupportedModel:
    """The error for a module, with the way to make a plain matrix of it."""
    kind = type(module)
    home = kind.__module__.split(".")[0]
    name = kind.__name__ if home in ("torch", "__main__") else f"{home}'s {kind.__name__}"
    if hasattr(module, "base_layer"):
        remedy = "make the Bridge from model.merge_and_unload()"
    elif isinstance(module, nn.Module) and parametrize.is_parametrized(module):
        remedy = "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    elif module is None:
        return UnsupportedModel("model", owner, f"{what} is missing; use another model")
    else:
        remedy = "make the Bridge from model.dequantize(), or load it without quantization"
    return UnsupportedModel("model", owner, f"{what}: {name} {reason}; {remedy}")
