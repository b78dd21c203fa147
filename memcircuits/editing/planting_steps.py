"""Steps of Adam for `plant`: in units of each matrix; the norms of matrices can be held.

A planted head whose matrices have grown can be told from its weights alone. `NormKeepingSteps`
scales the written weights of each matrix back to their norm after each step (projected gradient
descent on a sphere), for each head by itself.
"""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.editing.masks import Mask
from memcircuits.editing.optimization import AdamSteps

_BETAS = (0.9, 0.99)


class PlantingSteps(AdamSteps):
    """Steps of Adam, in units of the root mean square of each matrix."""

    @classmethod
    def of(cls, mask: Mask, learning_rate: float) -> Self:
        """Steps for the weights of a mask."""
        return cls(mask.root_mean_squares(), learning_rate, betas=_BETAS)


class NormKeepingSteps(PlantingSteps):
    """Such steps, after each of which every matrix of a head, or of an MLP, has its old norm."""

    @classmethod
    def of(cls, mask: Mask, learning_rate: float) -> Self:
        """Steps for the weights of a mask, as they are now."""
        steps = super().of(mask, learning_rate)
        device = steps.scale.device
        matrices, first = [], 0
        for weight, indices in zip(mask.weights, mask.indices, strict=True):
            n_heads = weight.values.shape[0]
            matrices.append(first + indices // (weight.values.numel() // n_heads))
            first += n_heads
        steps._matrix = torch.cat(matrices).to(device)
        steps._original = torch.cat([values.float().to(device) for values in mask.read()])
        steps._norm = steps._norms(steps._original, first)
        return steps

    def propose(self, gradient: Float[Tensor, " weight"], loss: float) -> None:
        """Step of Adam, then back to the norms."""
        super().propose(gradient, loss)
        moved = self._original + self.change
        norms = self._norms(moved, len(self._norm))
        factor = torch.where(norms > 0, self._norm / norms, 1.0)[self._matrix]
        with torch.no_grad():
            self.scaled_change.copy_((moved * factor - self._original) / self.scale)

    _matrix: Tensor  # which matrix each weight is in
    _original: Float[Tensor, " weight"]
    _norm: Float[Tensor, " matrix"]

    def _norms(
        self, weights: Float[Tensor, " weight"], n_matrices: int
    ) -> Float[Tensor, " matrix"]:
        """Norm of the masked weights of every matrix."""
        sums = weights.new_zeros(n_matrices)
        return sums.index_add(0, self._matrix, weights.square()).sqrt()
