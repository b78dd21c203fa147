"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.gradients import row_gradients
from memcircuits.models.adapter import Adapter
from memcircuits.models.weights import Weight

DAMPING = 0.1


def fisher_diagonal(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    draws: int,
    generator: torch.Generator,
    memory_budget: int | None = None,
) -> list[Tensor]:
    """Diagonal of the Fisher information at the continuations' positions, for each parameter.

    A small change d of the weights costs KL(original || changed) = 1/2 sum_i F_i d_i^2 nats/token
    where the diagonal is all there is. F is the mean over positions of the squared gradient of
    log p(y), y drawn from the model itself; gradients of independently drawn labels are
    uncorrelated, so the square of their sum over a paragraph estimates the sum of the squares
    without bias, and one draw costs one backward pass.
    """
    totals = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
    n = len(paragraphs) * paragraphs.n_continuation * draws
    for _, found in row_gradients(
        adapter,
        paragraphs,
        weights,
        drawn_labels(paragraphs, draws, generator),
        lambda _, gradient: gradient.float().square().sum(0),
        memory_budget,
    ):
        for squares in found:
            for weight, total, square in zip(weights, totals, squares, strict=True):
                weight.split(total).add_(square / n)
    return totals


def drawn_labels(
    paragraphs: Paragraphs, draws: int, generator: torch.Generator
) -> Callable[[slice, Float[Tensor, "batch pos d_vocab"]], list[Float[Tensor, " batch"]]]:
    """For `row_gradients`: log p of tokens drawn from the model itself, summed over positions.

    The same tokens are drawn for the same seed, whatever the batches and the device.
    """
    at = torch.rand(draws, len(paragraphs), paragraphs.n_continuation, 1, generator=generator)

    def scalars(piece: slice, logits: Tensor) -> list[Tensor]:
        log_p = logits.float().log_softmax(-1)
        below = log_p.detach().exp().cumsum(-1)
        found = []
        for draw in at[:, piece].to(logits.device):
            labels = (below < draw * below[..., -1:]).sum(-1).clamp_max(log_p.shape[-1] - 1)
            found.append(log_p.gather(-1, labels[..., None]).sum((-2, -1)))
        return found

    return scalars


def damped_root(fisher: Sequence[Tensor]) -> list[Tensor]:
    """sqrt(F + damping), the damping a tenth of the mean F of all the weights."""
    mean = sum(float(f.sum()) for f in fisher) / sum(f.numel() for f in fisher)
    floor = max(DAMPING * mean, torch.finfo(torch.float32).tiny)
    return [(f + floor).sqrt() for f in fisher]
