"""Steps of Adam in coordinates where the texts to keep look alike in every direction.

A change D of a matrix moves its outputs by x D. On texts to keep the inputs x vary much along few
directions and little along the others, and Adam, which gives every weight a step of about the same
size, changes the answers to these texts where their inputs are large. So the change is written as
D = R U, R the inverse root of the second moment of the inputs (damped), and Adam moves U: a unit of
any U moves the outputs on texts to keep by about as much as any other. Directions that only the
text to forget uses are then cheap. The preconditioner is the input half of K-FAC (Martens and
Grosse 2015). It takes an eigendecomposition for each matrix, the largest of d_mlp x d_mlp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.input_moments import input_moments
from memcircuits.editing.masks import Mask
from memcircuits.editing.optimization import AdamSteps
from memcircuits.models.adapter import Adapter

DAMPING = 0.001  # of the mean eigenvalue


def inverse_roots(
    adapter: Adapter, mask: Mask, paragraphs: Paragraphs, memory_budget: int | None = None
) -> list[Float[Tensor, "block d_in d_in"]]:
    """The inverse root of each matrix's second input moment, damped.

    Each is scaled so that a random change keeps its size on average.
    """
    roots = []
    for moment in input_moments(adapter, paragraphs, mask.weights, memory_budget):
        values, vectors = torch.linalg.eigh(moment.double())
        values = values.clamp_min(0)
        factors = (values / values.mean(-1, keepdim=True) + DAMPING).rsqrt()
        factors = factors / factors.square().mean(-1, keepdim=True).sqrt()
        root = (vectors * factors[:, None]) @ vectors.transpose(-1, -2)
        roots.append(root.to(mask.device, torch.float32))
    return roots


class WhitenedSteps(AdamSteps):
    """Steps of Adam for U, where the change is R U in the masked weights and nothing elsewhere.

    Args:
        mask: the weights.
        roots: R of each matrix.
        learning_rate: of Adam, in units of weight.
        decay_steps: number of steps in which the learning rate falls to 0 as a cosine; None: it is
            constant.
        start: the change to start from.
    """

    def __init__(
        self,
        mask: Mask,
        roots: Sequence[Float[Tensor, "block d_in d_in"]],
        learning_rate: float,
        decay_steps: int | None,
        start: Float[Tensor, " weight"],
    ) -> None:
        self.mask, self.roots, self.start = mask, roots, start
        self.coordinates = [
            torch.nn.Parameter(torch.zeros(weight.values.shape, device=mask.device))
            for weight in mask.weights
        ]
        self._optimize(self.coordinates, learning_rate, (0.9, 0.999), decay_steps)

    @property
    def change(self) -> Float[Tensor, " weight"]:
        """The change, in units of weight."""
        matrices = [root @ u.detach() for root, u in zip(self.roots, self.coordinates, strict=True)]
        return self.start + self.mask.select(matrices)

    def propose(self, gradient: Float[Tensor, " weight"], loss: float) -> None:
        """Step of Adam; the loss has no influence."""
        gradients = self.mask.spread(gradient)
        for root, u, of_matrix in zip(self.roots, self.coordinates, gradients, strict=True):
            u.grad = root @ of_matrix.to(u.device)
        self._step()
