"""What a change of weights costs the controls: a quadratic model of the KL.

For a small change d of the weights, KL(original || changed) on the controls is 1/2 d^T F d
nats/token. F is the Fisher information at the continuations' positions: the mean of s s^T, where s
is the gradient of log p of a token drawn from the model itself. Two parts of F matter:

* its diagonal, the cost of each weight by itself, which decides which weights to choose;
* for the chosen weights, also the other entries. Weights chosen for one paragraph act in the same
  direction, so the cost of changing them together is many times the sum of their single costs.

F of m chosen weights has m^2 entries, far more than a sample of s determines. The estimate is
that of the sample, R^T R with one row of R for each paragraph and draw, plus its own damped
diagonal, so that a direction without any sampled s also has a cost. The direction that changes a
quantity with gradient g for the least KL is F^-1 g (the natural gradient). By the Woodbury
identity it takes the solution of a system with as many equations as R has rows.

The model holds for small changes, and it is used for those only: the KL that a budget limits is
always measured, on other controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import Mask
from memcircuits.measure.fisher import damped_root, drawn_labels
from memcircuits.measure.gradients import iter_paragraph_gradients
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import free_memory
from memcircuits.models.weights import Weight


@dataclass(frozen=True)
class Quadratic:
    """KL on the controls as a function of a change of some weights, nats/token.

    F = diag(`diagonal`) + `gradient_samples`^T `gradient_samples`.

    Attributes:
        diagonal: the diagonal that is added to the products of the samples.
        gradient_samples: sampled gradients, scaled so that the sum of their products estimates F;
            without any, F is diagonal.
    """

    diagonal: Float[Tensor, " weight"]
    gradient_samples: Float[Tensor, "sample weight"]

    def kl(self, change: Float[Tensor, " weight"]) -> float:
        """1/2 d^T F d, nats/token."""
        diagonal = (self.diagonal * change.square()).sum()
        return 0.5 * float(diagonal + (self.gradient_samples @ change).square().sum())

    def natural_gradient(self, gradient: Float[Tensor, " weight"]) -> Float[Tensor, " weight"]:
        """F^-1 g: the direction that changes the quantity with this gradient for the least KL."""
        by_diagonal = gradient / self.diagonal
        if not len(self.gradient_samples):
            return by_diagonal
        right_side = (self.gradient_samples @ by_diagonal)[:, None]
        solution = torch.cholesky_solve(right_side, self._woodbury_factor)[:, 0]
        return by_diagonal - (self.gradient_samples.T @ solution) / self.diagonal

    @cached_property
    def _woodbury_factor(self) -> Float[Tensor, "sample sample"]:
        """Cholesky factor of I + R D^-1 R^T."""
        inner = (self.gradient_samples / self.diagonal) @ self.gradient_samples.T
        return torch.linalg.cholesky(inner + torch.eye(len(inner), device=inner.device))


@dataclass(frozen=True)
class Curvature:
    """Fisher information of controls: the diagonal for all candidates, more for a mask.

    Attributes:
        adapter: the model.
        control: the controls.
        weights: the candidate matrices.
        diagonal: for each matrix the diagonal of F, in the parameter's shape.
        fingerprint: identifies the model's weights.
        draws: labels drawn for each position.
        labels: log p of the drawn labels, for `iter_paragraph_gradients`.
        memory_budget: maximum bytes per batch.
        stored_samples: for each matrix all sampled gradients in bfloat16, [sample, weight]; empty
            if they were not stored.
    """

    adapter: Adapter
    control: Paragraphs
    weights: tuple[Weight, ...]
    diagonal: tuple[Tensor, ...]
    fingerprint: str
    draws: int
    labels: Callable[[slice, Tensor], Sequence[Tensor]]
    memory_budget: int | None
    stored_samples: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        control: Paragraphs,
        weights: Sequence[Weight],
        *,
        draws: int,
        seed: int,
        memory_budget: int | None = None,
        keep: bool = False,
    ) -> Curvature:
        """Estimate the diagonal in one pass over the controls.

        Args:
            adapter: the model.
            control: the controls.
            weights: the candidate matrices.
            draws: labels drawn for each position.
            seed: of the labels.
            memory_budget: maximum bytes per batch.
            keep: store all sampled gradients (in bfloat16) if a third of the free memory holds
                them, so that masks chosen later need no further pass.
        """
        labels = drawn_labels(control, draws, torch.Generator().manual_seed(seed))
        diagonal = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
        n_bytes = 2 * len(control) * draws * sum(total.numel() for total in diagonal)
        keep = keep and n_bytes < free_memory() // 3
        stored: list[list[Tensor]] = [[] for _ in weights]
        n_labels = len(control) * draws * control.n_continuation

        def reduce(index: int, gradient: Tensor) -> Tensor:
            # A batch that does not fit into memory is repeated: nothing may be accumulated here.
            if keep:
                return gradient.flatten(1).to("cpu", torch.bfloat16)
            return gradient.float().square().sum(0)

        batches = iter_paragraph_gradients(adapter, control, weights, labels, reduce, memory_budget)
        for _, gradients_per_draw in batches:
            for gradients in gradients_per_draw:
                for i, (weight, squares) in enumerate(zip(weights, gradients, strict=True)):
                    total = weight.split(diagonal[i])
                    if keep:
                        stored[i].append(squares)
                        squares = squares.float().square().sum(0).view(total.shape)
                    total.add_(squares.to(total.device) / n_labels)
        return cls(
            adapter=adapter,
            control=control,
            weights=tuple(weights),
            diagonal=tuple(diagonal),
            fingerprint=adapter.fingerprint(),
            draws=draws,
            labels=labels,
            memory_budget=memory_budget,
            stored_samples=tuple(torch.cat(samples) for samples in stored) if keep else (),
        )

    @cached_property
    def roots(self) -> list[Tensor]:
        """Square roots of the damped diagonal, in the parameters' shapes."""
        return damped_root(self.diagonal)

    def root_of(self, weight: Weight) -> Tensor:
        """Square root of the damped diagonal of one matrix, in the parameter's shape."""
        return self.roots[self._positions[weight.layer, weight.component]]

    @cached_property
    def _positions(self) -> dict[tuple[int, str], int]:
        return {(w.layer, w.component): i for i, w in enumerate(self.weights)}

    def restrict_to(self, mask: Mask, *, full: bool = True, resample: bool = False) -> Quadratic:
        """The quadratic model of a mask's weights.

        Args:
            mask: the weights.
            full: with the products of the sampled gradients; otherwise the diagonal only.
            resample: sample the gradients again, at the present weights.

        Raises:
            InputError: if the sampled gradients of the mask do not fit into memory.
        """
        diagonal = mask.gather([self.root_of(w) for w in mask.weights]).square()
        if not full:
            return Quadratic(diagonal, diagonal.new_zeros(0, len(diagonal)))
        n_bytes = 4 * len(diagonal) * len(self.control) * self.draws
        if n_bytes > free_memory() // 2:
            raise InputError(
                "curvature",
                f"{len(diagonal):,} weights together take {n_bytes / 2**30:.1f} GiB",
                'choose a smaller fraction, fewer draws or a recipe with curvature="diagonal"',
            )
        if self.stored_samples and not resample:
            samples = self._stored(mask).to(diagonal.device)
        else:
            samples = self._sampled(mask, diagonal.device)
        n_labels = len(samples) * self.control.n_continuation
        return Quadratic(diagonal, samples / n_labels**0.5)

    def _stored(self, mask: Mask) -> Float[Tensor, "sample weight"]:
        stored = [self.stored_samples[self._positions[w.layer, w.component]] for w in mask.weights]
        columns = [s[:, index].float() for s, index in zip(stored, mask.indices, strict=True)]
        return torch.cat(columns, 1)

    def _sampled(self, mask: Mask, device: torch.device) -> Float[Tensor, "sample weight"]:
        indices = [index.to(device) for index in mask.indices]
        batches = iter_paragraph_gradients(
            self.adapter,
            self.control,
            mask.weights,
            self.labels,
            lambda i, gradient: gradient.flatten(1)[:, indices[i]].float(),
            self.memory_budget,
        )
        return torch.cat([torch.cat(columns, 1) for _, draws in batches for columns in draws])
