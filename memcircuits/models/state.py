"""Leaving a model as it came: training flags, gradients and forwards, also after an exception.

Analyses evaluate models in a state of their own making: no dropout, gradients only for the
parameters that are asked about, and fused kernels (`memcircuits.models.kernels`). The caller's
model may be in training, with gradients accumulated and some parameters frozen; it is found so
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcircuits.base.errors import UnsupportedModel
from memcircuits.base.torch_state import plain_torch
from memcircuits.models.architecture import (
    architecture_of,
    every_module,
    every_parameter,
    is_bridge,
)
from memcircuits.models.kernels import patched_forwards


@contextlib.contextmanager
def preserved(
    model: Any,
    grad: Sequence[nn.Parameter],
    forwards: Sequence[tuple[nn.Module, Callable[..., Tensor]]],
) -> Iterator[None]:
    """Inside, a model is evaluated; afterwards it is as it was.

    Args:
        model: a TransformerLens model.
        grad: the only parameters that require gradients inside; without any, gradients are off.
        forwards: see `memcircuits.models.kernels.patched_forwards`.

    Raises:
        UnsupportedModel: if gradients are asked for and the weights cannot have any.
    """
    refuse_inference_tensors(model, grad)
    training = [module for module in every_module(model) if module.training]
    wanted = {id(parameter) for parameter in grad}
    flags = [(p, p.requires_grad) for p in every_parameter(model)] if grad else []
    copies = _plain_copies(model) if grad else []
    try:
        for module in training:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        for attributes, name, _, parameter in copies:
            attributes[name] = parameter
        with plain_torch(), torch.set_grad_enabled(bool(grad)), patched_forwards(forwards):
            yield
    finally:
        for attributes, name, tensor, _ in copies:
            attributes[name] = tensor
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


def refuse_inference_tensors(model: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse parameters made in `torch.inference_mode()`.

    Outside of it torch can neither differentiate nor change them.

    Raises:
        UnsupportedModel: if there are any.
    """
    if any(parameter.is_inference() for parameter in parameters):
        raise UnsupportedModel(
            "model",
            architecture_of(model),
            "its weights were made inside torch.inference_mode(), so they have no gradients and "
            "cannot be edited; load the model outside of it",
        )


def _plain_copies(model: Any) -> list[tuple[dict[str, Any], str, Tensor, nn.Parameter]]:
    """Plain tensors that modules compute with in place of a parameter of the same memory.

    After `enable_compatibility_mode()` the gated MLPs of TransformerLens 3.9 hold such: edits of
    the parameter reach them, gradients do not.

    Returns:
        For each the attributes of its module, its name there, itself and the parameter.
    """
    if not is_bridge(model):
        return []
    parameters = {(p.data_ptr(), p.shape): p for p in model.parameters() if p.numel()}
    return [
        (vars(module), name, value, parameters[value.data_ptr(), value.shape])
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and (value.data_ptr(), value.shape) in parameters
    ]
