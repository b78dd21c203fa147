"""Rivals of deep unlearning that take weights away, written from their papers.

* `kfac`: keep of each matrix of the MLPs the directions of much curvature, without a set to forget
  (Merullo et al. 2025, arXiv 2510.24256);
* `balanced_subnet`: learn which weights of the MLPs to drop so that the text is lost and other text
  is kept (Sakarvadia et al. 2024, arXiv 2410.02159);
* `delete_neurons`: drop the neurons that a localization method names (Chang et al. 2024, arXiv
  2311.09060).

Every edit is a change of weights like ours, measured in the same way.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import memcircuits as mc
from memcircuits.benchmark.localizers import localize
from memcircuits.benchmark.units import LocalizationTask
from memcircuits.editing.edit import Edit
from memcircuits.editing.input_moments import input_moments
from memcircuits.editing.masks import Candidates, Mask
from memcircuits.editing.recipe import DEEP
from memcircuits.measure.continuation import continuation_logits, score_continuation
from memcircuits.measure.fisher import drawn_labels
from memcircuits.models.batching import iter_batches
from memcircuits.models.weights import MLP_COMPONENTS, Weight
from memcircuits.results.provenance import Provenance
from unlearning_page.setting import SEED, setting

BATCH = 16  # texts in a pass with gradients


def whole_matrices(layers: Sequence[int] | None = None) -> Mask:
    """All weights of the MLPs' matrices, of all layers or of these."""
    candidates = Candidates.of(setting().adapter, layers=layers, components=MLP_COMPONENTS)
    return candidates.choose(1.0, None, "all")


def edit_to(mask: Mask, matrices: Sequence[Tensor], **settings: Any) -> Edit:
    """The edit that puts these matrices, [1, d_in, d_out] each, in the place of the mask's."""
    provenance = Provenance.of(setting().adapter, {"control": setting().given}, **settings)
    after = [matrix.flatten() for matrix in matrices]
    return Edit.of(mask, mask.read(), after, provenance)


# -- K-FAC removal --------------------------------------------------------------------------------


def kfac(target: mc.Paragraphs, mass: float, n_layers: float) -> Edit:
    """Keep the pairs of eigenvectors that hold this mass of the curvature; the target is not read.

    Args:
        target: ignored.
        mass: share of the sum of the products of eigenvalues that is kept.
        n_layers: the first so many layers are edited.
    """
    del target
    mask = whole_matrices(range(int(n_layers)))
    matrices = [
        of_much_curvature(weight.values[0], *kfac_factors()[f"{weight.layer}.{weight.component}"],
                          mass)[None]
        for weight in mask.weights
    ]  # fmt: skip
    return edit_to(mask, matrices, rival="kfac", mass=mass, n_layers=int(n_layers))


def of_much_curvature(matrix: Tensor, inputs: Tensor, gradients: Tensor, mass: float) -> Tensor:
    """The part of a matrix in the pairs of eigenvectors of largest curvature.

    Args:
        matrix: [d_in, d_out].
        inputs: second moment of its inputs, [d_in, d_in].
        gradients: second moment of the gradients of its outputs, [d_out, d_out].
        mass: share of the sum of all products of two eigenvalues that the kept pairs hold.
    """
    in_values, in_vectors = torch.linalg.eigh(inputs.double())
    out_values, out_vectors = torch.linalg.eigh(gradients.double())
    products = torch.outer(in_values.clamp_min(0), out_values.clamp_min(0)).flatten()
    falling, order = products.sort(descending=True)
    n_kept = int((falling.cumsum(0) < mass * falling.sum()).sum()) + 1
    kept = torch.zeros_like(products)
    kept[order[:n_kept]] = 1
    coordinates = in_vectors.T @ matrix.double() @ out_vectors
    coordinates *= kept.view_as(coordinates)
    return (in_vectors @ coordinates @ out_vectors.T).to(matrix.dtype)


@cache
def kfac_factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Matrix -> second moments of its inputs and of its outputs' gradients, on text to keep.

    The gradients are of the log-probability of drawn tokens.
    """
    s, weights = setting(), whole_matrices().weights
    texts = s.given_to_rivals
    inputs = [moment[0] for moment in input_moments(s.adapter, texts, weights)]
    gradients = [torch.zeros(()) for _ in weights]
    log_probs = drawn_labels(texts, 1, torch.Generator().manual_seed(SEED))

    def add(batch: slice) -> None:
        with outputs_of(weights) as outputs:
            (total,) = log_probs(batch, continuation_logits(s.adapter, texts, batch))
        for i, grad in enumerate(torch.autograd.grad(total.sum(), outputs)):
            rows = grad.reshape(-1, grad.shape[-1])
            gradients[i] = gradients[i] + rows.T @ rows

    with s.adapter.preserving_state(grad=[weight.parameter for weight in weights]):
        for _ in iter_batches(len(texts), BATCH, add):
            pass
    return {
        f"{weight.layer}.{weight.component}": moments
        for weight, *moments in zip(weights, inputs, gradients, strict=True)
    }  # type: ignore[misc]


@contextlib.contextmanager
def outputs_of(weights: Sequence[Weight]) -> Iterator[list[Tensor]]:
    """The outputs of the weights' modules in a forward pass, in their order, when it is over."""
    outputs: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for weight in weights:
            assert isinstance(weight.module, nn.Module)
            handle = weight.module.register_forward_hook(lambda *call: outputs.append(call[-1]))
            hooks.callback(handle.remove)
        yield outputs
    assert len(outputs) == len(weights)


# -- BalancedSubnet -------------------------------------------------------------------------------


def balanced_subnet(target: mc.Paragraphs, dropped: float, rate: float) -> Edit:
    """Drop weights by scores that are trained to lose the target and to keep other text.

    Every weight has a score; those with the smallest absolute scores in their matrix are 0. The
    scores move by stochastic gradient descent with momentum 0.9 and weight decay 5e-4 on the loss
    of a batch of text to keep minus that of the target, straight through the choice.

    Args:
        target: the paragraph.
        dropped: share of the weights of each matrix that is 0.
        rate: of the descent.
    """
    s, mask = setting(), whole_matrices()
    generator = torch.Generator().manual_seed(SEED)
    scores = [initial_scores(weight.values[0], generator) for weight in mask.weights]
    optimizer = torch.optim.SGD(scores, lr=rate, momentum=0.9, weight_decay=5e-4)
    texts, parameters = s.given_to_rivals, mask.parameters
    original = [weight.values[0].clone() for weight in mask.weights]
    with mask.restored():
        for _ in range(DEEP.steps):
            write_subnet(mask, original, scores, dropped)
            drawn = torch.randperm(len(texts), generator=generator)[:BATCH]
            with s.adapter.preserving_state(grad=parameters):
                kept = score_continuation(s.adapter, texts, drawn).nll.mean()
                loss = kept - score_continuation(s.adapter, target).nll.mean()
                gradients = torch.autograd.grad(loss, parameters)
            for score, weight, gradient, old in zip(
                scores, mask.weights, gradients, original, strict=True
            ):
                score.grad = weight.split(gradient)[0] * old * score.detach().sign()
            optimizer.step()
        write_subnet(mask, original, scores, dropped)
        matrices = [weight.values.clone() for weight in mask.weights]
    return edit_to(mask, matrices, rival="balanced-subnet", dropped=dropped, rate=rate)


def initial_scores(matrix: Tensor, generator: torch.Generator) -> nn.Parameter:
    """Uniform within 1 / sqrt(d_in) of 0."""
    bound = 1 / math.sqrt(len(matrix))
    return nn.Parameter(bound * (2 * torch.rand(matrix.shape, generator=generator) - 1))


def write_subnet(
    mask: Mask, original: Sequence[Tensor], scores: Sequence[Tensor], dropped: float
) -> None:
    """Put 0 in the place of the weights of each matrix with the smallest absolute scores."""
    for weight, old, score in zip(mask.weights, original, scores, strict=True):
        size = score.detach().abs().flatten()
        smallest = size.topk(int(dropped * len(size)), largest=False).indices
        new = old.flatten().clone()
        new[smallest] = 0
        weight.values.copy_(new.view_as(weight.values))


# -- Neurons --------------------------------------------------------------------------------------

LOCALIZERS = ("integrated-gradients", "hard-concrete")


def delete_neurons(target: mc.Paragraphs, localizer: float, n_neurons: float) -> Edit:
    """Set the outputs of the neurons to 0 that a method ranks highest for the target.

    Args:
        target: the paragraph.
        localizer: index in `LOCALIZERS`.
        n_neurons: so many are dropped, of all layers together.
    """
    s = setting()
    name = LOCALIZERS[int(localizer)]
    scores = localize(LocalizationTask(s.model, target, s.given, seed=SEED), name, "neuron")
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.topk(int(n_neurons)).indices] = True
    candidates = Candidates.of(s.adapter, components=["W_out"])
    mask = candidates.choose(1.0, None, "all")
    matrices = []
    for weight, rows in zip(mask.weights, chosen.view(len(mask.weights), -1), strict=True):
        matrices.append(weight.values * ~rows[:, None])
    return edit_to(mask, matrices, rival="delete", localizer=name, n_neurons=int(n_neurons))
