"""What a norm does to the residual stream, read off by trying it.

Up to its scale, every norm before an MLP or an unembedding is linear:

    norm(x) = weight * (x - mean(x)) / scale(x) + bias,    scale(x) = sqrt(mean square + eps),

where RMSNorm subtracts no mean. With the scale held at its value in a forward pass (*frozen*), the
norm of a sum is the sum of the norms, so that a neuron's input is a sum over the parts of the model
that wrote it. Architectures store the parts of a norm under many names, fold them into other
weights or add 1 to them; four inputs tell them all: zeros give the bias, alternating signs the
weight, a shift says whether the mean is subtracted, a small input gives eps. A further input
checks the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter

_TINY = 1e-2  # size of the input that shows eps, which is 1e-5 or 1e-6


@dataclass(frozen=True)
class AffineNorm:
    """A LayerNorm or RMSNorm, whatever it is called and stored as.

    Attributes:
        weight: factor of each dimension, [d_model].
        bias: added to each dimension, [d_model].
        centred: whether the mean over the dimensions is subtracted first.
        eps: added to the mean square.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    eps: float

    def scale(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row 1"]:
        """What the input is divided by."""
        return (self._centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The norm itself."""
        return self.weight * self._centre(x) / self.scale(x) + self.bias

    def pull_back(self, direction: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The direction in the input whose product is that of `direction` with the output.

        Without the division by the scale, and without the bias.
        """
        return self._centre(self.weight * direction)

    @property
    def is_plain(self) -> bool:
        """Whether it only divides by the scale (and centres): its weight is 1, its bias 0."""
        ones, zeros = torch.ones_like(self.weight), torch.zeros_like(self.bias)
        return _close(self.weight, ones) and _close(1 + self.bias, 1 + zeros)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def mlp_norm(adapter: Adapter, layer: int) -> AffineNorm:
    """The norm before the MLP of a layer.

    Raises:
        UnsupportedModel: if the block has none of its own, or it is no such norm.
    """
    norm = getattr(adapter.model.blocks[layer], "ln2", None)
    if norm is None:
        remedy = "its blocks have no norm of their own before the MLP; use another model"
        raise UnsupportedModel("model", adapter.label, remedy)
    return read_norm(norm, adapter)


def final_norm(adapter: Adapter) -> AffineNorm:
    """The norm before the unembedding.

    Raises:
        UnsupportedModel: if it is no LayerNorm or RMSNorm.
    """
    return read_norm(adapter.model.ln_final, adapter)


def unembedding(adapter: Adapter, norm: AffineNorm) -> Float[Tensor, "d_model d_vocab"]:
    """The direction of every token in the residual stream, the final norm's weight included.

    The mean over the vocabulary is subtracted, as it changes no probability. The product of a
    direction with the residual stream, divided by the norm's scale, is the token's logit minus the
    mean logit, up to a constant of the token.

    Args:
        adapter: the model.
        norm: its final norm.

    Raises:
        UnsupportedModel: if logits are not linear in the final norm's output (Gemma's soft cap).
    """
    matrix = adapter.model.W_U.detach()
    with adapter.preserving_state():
        x = torch.linspace(-3, 3, 2 * adapter.d_model).view(1, 2, -1).to(matrix)
        zero, logits = adapter.unembed(0 * x), adapter.unembed(x)
        linear = (norm(x) - norm.bias) @ matrix
    if not _close(logits - zero, linear):
        remedy = "its logits are not linear in the residual stream; use another model"
        raise UnsupportedModel("model", adapter.label, remedy)
    return norm.pull_back((matrix - matrix.mean(1, keepdim=True)).T).T


def read_norm(norm: Callable[[Tensor], Tensor], adapter: Adapter) -> AffineNorm:
    """The parts of a norm, from its answers to a few inputs."""
    d = adapter.d_model
    signs = torch.ones(1, 1, d, device=adapter.device, dtype=adapter.dtype)
    signs[..., 1::2] = -1
    shift = 0.5 * torch.ones_like(signs)
    with adapter.preserving_state():
        bias = norm(torch.zeros_like(signs))[0, 0]
        large, tiny = norm(1e3 * signs)[0, 0] - bias, norm(_TINY * signs)[0, 0] - bias
        weight = large * signs[0, 0]
        centred = _close(norm(1e3 * (signs + shift))[0, 0] - bias, large)
        shrunk = float((tiny.abs().sum() / large.abs().sum()).double())
        eps = max(0.0, _TINY**2 * (1 / shrunk**2 - 1))
        result = AffineNorm(weight, bias, centred, eps)
        x = torch.linspace(-2, 1, d).to(signs).cos()[None, None] + shift
        agrees = _close(norm(x), result(x))
    if not agrees:
        remedy = "one of its norms is neither LayerNorm nor RMSNorm; use another model"
        raise UnsupportedModel("model", adapter.label, remedy)
    return result


def _close(value: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((value - expected).abs().max() <= tolerance * expected.abs().max())
