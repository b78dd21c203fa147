"""What would a change of weights cost on the controls? A quadratic model that needs no more passes.

For a small change d, KL(original || changed) on the controls is 1/2 d^T F d nats/token, with F the
Fisher information at the continuations' positions, the mean of s s^T with s the gradient of log p
of a token that the model itself draws. Two parts of F matter:

* its diagonal, which says what each weight costs alone, and so which weights to choose;
* for the chosen ones, what they cost together. Weights that are chosen for one paragraph push the
  same way, and what they push the controls feel many times over.

F of m chosen weights has m^2 entries, far more than any sample of s determines. The estimate is the
sample's, R^T R with one row for each paragraph and draw, plus its own damped diagonal: change in a
direction that no sampled s has is not free. The steepest way to change something with gradient g
for the least KL is F^-1 g, by the Woodbury identity a system of as many equations as rows.

The model is good as long as the change is small, and that is what it is used for: the KL that
counts is always measured, on other controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError
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

    Attributes:
        own: the diagonal that is added to the rows' products.
        rows: sampled gradients, scaled so that their products add up to F; none: F is `own`.
    """

    own: Float[Tensor, " weight"]
    rows: Float[Tensor, "batch weight"]

    def kl(self, change: Float[Tensor, " weight"]) -> float:
        """1/2 d^T F d, nats/token."""
        own = (self.own * change.square()).sum()
        return 0.5 * float(own + (self.rows @ change).square().sum())

    def cheapest(self, gradient: Float[Tensor, " weight"]) -> Float[Tensor, " weight"]:
        """F^-1 g: the direction in which a gain costs least."""
        alone = gradient / self.own
        if not len(self.rows):
            return alone
        inner = torch.cholesky_solve((self.rows @ alone)[:, None], self._factor)[:, 0]
        return alone - (self.rows.T @ inner) / self.own

    @cached_property
    def _factor(self) -> Tensor:
        inner = (self.rows / self.own) @ self.rows.T
        return torch.linalg.cholesky(inner + torch.eye(len(inner), device=inner.device))


@dataclass(frozen=True)
class Curvature:
    """Fisher information of controls, for all candidates by itself and for a mask together.

    Attributes:
        control: the controls.
        weights: the candidate matrices.
        diagonal: for each the diagonal of F, in the parameter's shape.
        fingerprint: names the model's weights.
        draws: labels drawn for each position.
    """

    adapter: Adapter
    control: Paragraphs
    weights: tuple[Weight, ...]
    diagonal: tuple[Tensor, ...]
    fingerprint: str
    draws: int
    labels: Callable[[slice, Tensor], Sequence[Tensor]]
    memory_budget: int | None
    kept: tuple[Tensor, ...] = ()

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
        """Pass over the controls once.

        Args:
            adapter: the model.
            control: the controls.
            weights: the candidate matrices.
            draws: labels drawn for each position.
            seed: of the labels.
            memory_budget: bytes that one batch may take.
            keep: keep all sampled gradients (in bfloat16), where a third of the free memory holds
                them, so that further masks need no further pass.
        """
        labels = drawn_labels(control, draws, torch.Generator().manual_seed(seed))
        totals = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
        size = 2 * len(control) * draws * sum(t.numel() for t in totals)
        keep = keep and size < free_memory() // 3
        kept: list[list[Tensor]] = [[] for _ in weights]
        n = len(control) * draws * control.n_continuation

        def reduce(index: int, gradient: Tensor) -> Tensor:
            # A piece that does not fit is done again: nothing is added here.
            if keep:
                return gradient.flatten(1).to("cpu", torch.bfloat16)
            return gradient.float().square().sum(0)

        for _, found in iter_paragraph_gradients(
            adapter, control, weights, labels, reduce, memory_budget
        ):
            for parts in found:
                for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
                    into = weight.split(totals[i])
                    if keep:
                        kept[i].append(part)
                        part = part.float().square().sum(0).view(into.shape).to(into.device)
                    into.add_(part / n)
        return cls(
            adapter=adapter,
            control=control,
            weights=tuple(weights),
            diagonal=tuple(totals),
            fingerprint=adapter.fingerprint(),
            draws=draws,
            labels=labels,
            memory_budget=memory_budget,
            kept=tuple(torch.cat(parts) for parts in kept) if keep else (),
        )

    @cached_property
    def roots(self) -> list[Tensor]:
        """Roots of the damped diagonal, in the parameters' shapes."""
        return damped_root(self.diagonal)

    def root_of(self, weight: Weight) -> Tensor:
        """The same of one matrix."""
        return self.roots[self._places[weight.layer, weight.component]]

    @cached_property
    def _places(self) -> dict[tuple[int, str], int]:
        return {(w.layer, w.component): i for i, w in enumerate(self.weights)}

    def on(self, mask: Mask, *, together: bool = True, anew: bool = False) -> Quadratic:
        """The quadratic model of a mask's weights.

        Args:
            mask: the weights.
            together: not their diagonal alone.
            anew: sample again, at the weights as they are now.
        """
        own = mask.gather([self.root_of(w) for w in mask.weights]).square()
        if not together:
            return Quadratic(own, own.new_zeros(0, len(own)))
        size = 4 * len(own) * len(self.control) * self.draws
        if size > free_memory() // 2:
            raise InputError(
                "curvature",
                f"{len(own):,} weights together take {size / 2**30:.1f} GiB",
                'choose a smaller fraction, fewer draws or a recipe with curvature="diagonal"',
            )
        if self.kept and not anew:
            mine = [self.kept[self._places[w.layer, w.component]] for w in mask.weights]
            parts = [m[:, index].float() for m, index in zip(mine, mask.indices, strict=True)]
            rows = torch.cat(parts, 1).to(own.device)
        else:
            indices = [index.to(own.device) for index in mask.indices]
            found = iter_paragraph_gradients(
                self.adapter,
                self.control,
                mask.weights,
                self.labels,
                lambda i, gradient: gradient.flatten(1)[:, indices[i]].float(),
                self.memory_budget,
            )
            rows = torch.cat([torch.cat(parts, 1) for _, draws in found for parts in draws])
        return Quadratic(own, rows / (len(rows) * self.control.n_continuation) ** 0.5)
