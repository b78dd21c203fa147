"""Fisher information of weights: how much a small change of a weight changes the predictions.

A small change d of the weights costs KL(original || changed) = 1/2 d^T F d nats/token, where F, the
Fisher information, is the mean over positions of the outer product of the gradient of log p(y) with
itself, for tokens y drawn from the model. At the original weights the KL is at its minimum, so it
has no gradient there: F is all that controls can say about a first step. The diagonal of F alone
gives KL = 1/2 sum_i F_i d_i^2, and raising the NLL by the gradient g for the least KL means
d_i ~ g_i / F_i.

The estimate here is sampled. Gradients of independently drawn labels are uncorrelated, so the
square of their sum over a paragraph estimates the sum of their squares without bias, and one draw
costs one backward pass. (The "empirical" Fisher, with the true tokens in place of drawn ones, has
no such meaning: Kunstner et al. 2019, arXiv 1905.12558.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.gradients import iter_paragraph_gradients
from memcircuits.models.adapter import Adapter
from memcircuits.models.weights import Weight

DAMPING = 0.1  # of the mean Fisher information


def fisher_diagonal(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    draws: int,
    generator: torch.Generator,
    memory_budget: int | None = None,
) -> list[Tensor]:
    """Diagonal of the Fisher information at the continuations' positions, for each parameter.

    Args:
        adapter: the model.
        paragraphs: where the predictions are taken.
        weights: the matrices.
        draws: number of labels drawn per position; each costs a backward pass.
        generator: draws the labels.
        memory_budget: maximum bytes per batch.

    Returns:
        One tensor per weight, of its parameter's shape, in nats/token per squared unit of weight.
    """
    totals = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
    n_labels = len(paragraphs) * paragraphs.n_continuation * draws
    labels = drawn_labels(paragraphs, draws, generator)

    def sum_of_squares(_: int, grad: Float[Tensor, "batch head d_in d_out"]) -> Tensor:
        return grad.float().square().sum(0)

    for _, squares_of_draws in iter_paragraph_gradients(
        adapter, paragraphs, weights, labels, sum_of_squares, memory_budget
    ):
        for squares in squares_of_draws:
            for weight, total, square in zip(weights, totals, squares, strict=True):
                weight.split(total).add_(square / n_labels)
    return totals


def drawn_labels(
    paragraphs: Paragraphs, draws: int, generator: torch.Generator
) -> Callable[[slice, Float[Tensor, "batch pos d_vocab"]], list[Float[Tensor, " batch"]]]:
    """For `iter_paragraph_gradients`: log p of tokens drawn from the model, summed over positions.

    The same seed draws the same tokens, whatever the batches and the device.
    """
    uniform = torch.rand(draws, len(paragraphs), paragraphs.n_continuation, 1, generator=generator)

    def log_probs_of_draws(
        batch: slice, logits: Float[Tensor, "batch pos d_vocab"]
    ) -> list[Float[Tensor, " batch"]]:
        log_p = logits.float().log_softmax(-1)
        cumulative = log_p.detach().exp().cumsum(-1)
        sums = []
        for draw in uniform[:, batch].to(logits.device):
            # Inverse transform sampling; the sum of the probabilities is not exactly 1.
            labels = (cumulative < draw * cumulative[..., -1:]).sum(-1)
            labels = labels.clamp_max(log_p.shape[-1] - 1)
            sums.append(log_p.gather(-1, labels[..., None]).sum((-2, -1)))
        return sums

    return log_probs_of_draws


def damped_root(fisher: Sequence[Tensor]) -> list[Tensor]:
    """sqrt(F + damping), with a tenth of the mean F of all weights as damping.

    Without it, weights that the controls do not use would score infinitely high.
    """
    mean = sum(float(f.sum()) for f in fisher) / sum(f.numel() for f in fisher)
    damping = max(DAMPING * mean, torch.finfo(torch.float32).tiny)
    return [(f + damping).sqrt() for f in fisher]
