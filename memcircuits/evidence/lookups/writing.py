"""What each neuron adds to the logit of a token, without any later layer.

A neuron with activation a adds a w_out to the residual stream. With the scale of the final norm
held at its value, that adds a <w_out, u_t> / scale to the logit of token t, where u_t is the
unembedding with the norm's weight folded in and the mean over the vocabulary subtracted. The
*congruence* of a neuron is its largest <w_out, u_t>; a *next-token neuron* has a high one (Neo,
Cohen and Barez 2024, arXiv 2402.15055).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.norms import AffineNorm, final_norm, unembedding

_NEURONS_AT_ONCE = 256  # their products with the whole vocabulary are held at once


@dataclass(frozen=True)
class Congruence:
    """How strongly each neuron writes the token that it writes most.

    Attributes:
        values: largest product of a neuron's output weights with a token's direction.
        tokens: that token.
    """

    values: Float[Tensor, "layer neuron"]
    tokens: Int[Tensor, "layer neuron"]


class LogitWriting:
    """Neurons and the directions of tokens in one model.

    Args:
        adapter: the model.

    Raises:
        UnsupportedModel: if its logits are not linear in the final norm's output.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._norm: AffineNorm = final_norm(adapter)
        self._directions = unembedding(adapter, self._norm)

    def congruence(self) -> Congruence:
        """The congruence of every neuron."""
        best = [
            (neurons @ self._directions).max(-1)
            for layer in range(self._adapter.n_layers)
            for neurons in self._out(layer).split(_NEURONS_AT_ONCE)
        ]
        shape = (self._adapter.n_layers, -1)
        return Congruence(
            torch.cat([b.values for b in best]).view(shape).float().cpu(),
            torch.cat([b.indices for b in best]).view(shape).cpu(),
        )

    def contributions(
        self, paragraphs: Paragraphs, batch: slice
    ) -> Float[Tensor, "batch pos layer neuron"]:
        """What every neuron adds to the logit of every continuation token."""
        n_layers = self._adapter.n_layers
        final = hook_name("resid_post", n_layers - 1)
        names = [hook_name("post", layer) for layer in range(n_layers)]
        cache = run_to_continuation(self._adapter, paragraphs, batch, read=[*names, final]).cache
        predicting = slice(-paragraphs.n_continuation, None)
        tokens = paragraphs.continuation[batch].to(self._directions.device)
        directions = self._directions.T[tokens] / self._norm.scale(cache[final][:, predicting])
        return torch.stack(
            [
                cache[name][:, predicting] * (directions @ self._out(layer).T)
                for layer, name in enumerate(names)
            ],
            2,
        )

    def _out(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        return self._adapter.weight(layer, "W_out").values[0]
