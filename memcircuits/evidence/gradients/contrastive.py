"""Gradients that set memorized paragraphs against controls (equation 3).

The objective is KL(original || current) on the controls minus the NLL on the memorized paragraphs.
At the original weights, where the paper takes its mask, the KL is zero and at its minimum. Its
gradient therefore vanishes exactly: the gradient of the objective there *is* that of the NLL, and
does not depend on the controls.

What the KL does have at the original weights is curvature: KL = 1/2 d^T F d for a small change d of
the weights, where F is the Fisher information on the controls (`memcircuits.measure.fisher`).
Raising the NLL most for a given KL means d_i ~ g_i / F_i, where g is the gradient of the NLL;
weight i then contributes g_i^2 / F_i. `contrastive_gradients` therefore scores a weight by
|g| / sqrt(F + damping); `curvature=False` scores it by |g|, as the paper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import at_least, one_of
from memcircuits.base.progress import bar
from memcircuits.base.statistics import left_out
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.draws import random_order
from memcircuits.data.overlap import refuse_overlap
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.gradients.parameters import ParameterGradients
from memcircuits.evidence.gradients.pooling import Pool, layer_summaries, stack_layers, summarize
from memcircuits.measure.fisher import damped_root, fisher_diagonal
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.models.weights import Weight
from memcircuits.results.provenance import Provenance


@plain_torch()
def contrastive_gradients(  # noqa: PLR0913
    model: Model,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    curvature: bool = True,
    n_control: int = 10,
    draws: int = 8,
    pool: Pool = "max",
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the contrastive objective (equation 3 of the paper), paragraph by paragraph.

    Each memorized paragraph is set against its own random draw of controls, from as many groups of
    dependent controls as possible. The KL term has no gradient at the original weights (see the
    module docstring): it enters by its curvature.

    Args:
        model: the model.
        memorized: paragraphs to forget.
        control: paragraphs to keep.
        curvature: divide by the root of the controls' Fisher information; False gives the gradient
            of the objective itself, which does not depend on the controls.
        n_control: number of controls for each memorized paragraph.
        draws: label draws of the Fisher estimate (relative error sqrt(2 / draws) per weight).
        pool: `max`, `mean` or `l2` over the weights of a component.
        seed: seed of the draws of controls and labels.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` with one sample per memorized paragraph, and `cosine` between the mean
        NLL gradients of memorized and control paragraphs. The constant before the NLL is left out.

    Raises:
        InputError: for unusable paragraphs or controls that are in the memorized set.
    """
    one_of("pool", pool, get_args(Pool))
    at_least("n_control", n_control, 1)
    at_least("draws", draws, 1)
    adapter = adapt(model)
    memorized, control, notes = _usable_sets(adapter, memorized, control, memory_budget)
    weights = adapter.weights()
    generator = torch.Generator().manual_seed(seed)

    _, control_grads = mean_gradient(adapter, control, weights, memory_budget, progress)
    loss = 0.0
    memorized_grads = [torch.zeros_like(grad) for grad in control_grads]  # of the mean NLL
    summaries: list[list[Tensor]] = []  # of each paragraph, for each weight
    with bar(len(memorized), "contrast", progress=progress) as progress_bar:
        for paragraph in memorized:
            nll, grads = mean_gradient(adapter, paragraph, weights, memory_budget, progress=False)
            loss += nll / len(memorized)
            for total, grad in zip(memorized_grads, grads, strict=True):
                total += grad / len(memorized)
            if curvature:
                drawn = control[random_order(control.groups, generator)[:n_control]]
                fisher = fisher_diagonal(adapter, drawn, weights, draws, generator, memory_budget)
                roots = damped_root(fisher)
                grads = [grad / root for grad, root in zip(grads, roots, strict=True)]
            summaries.append(
                [summarize(w.split(g), pool) for w, g in zip(weights, grads, strict=True)]
            )
            progress_bar.update()
    samples_by_weight = [torch.stack(samples) for samples in zip(*summaries, strict=True)]
    by_component = layer_summaries(weights, samples_by_weight)
    return ParameterGradients(
        values={name: summary.mean_pooled for name, summary in by_component.items()},
        pool=pool,
        loss=loss,
        provenance=Provenance.of(
            adapter,
            {"memorized": memorized, "control": control},
            curvature=curvature,
            n_control=n_control,
            draws=draws,
            pool=pool,
            seed=seed,
        ),
        objective="contrastive",
        units="root of nats/token" if curvature else "nats/token per unit of weight",
        samples={name: summary.pooled.contiguous() for name, summary in by_component.items()},
        statistics={name: summary.mean_statistics for name, summary in by_component.items()},
        cosine=_cosines(weights, memorized_grads, control_grads),
        notes=notes,
    )


def _usable_sets(
    adapter: Adapter,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    memory_budget: int | None,
) -> tuple[Paragraphs, Paragraphs, tuple[str, ...]]:
    """Both sets, without paragraphs of non-finite numbers, and notes about these.

    Raises:
        InputError: if a set is unusable or both share a paragraph.
    """
    sets = {
        "memorized": Paragraphs.of(memorized, adapter, "memorized"),
        "control": Paragraphs.of(control, adapter, "control"),
    }
    for argument, paragraphs in sets.items():
        adapter.check_tokens(paragraphs.inputs, argument)
    refuse_overlap(sets["memorized"], sets["control"], same="prefix")
    notes: list[str] = []
    for argument, paragraphs in sets.items():
        finite = has_finite_scores(adapter, paragraphs, argument, memory_budget)
        notes += [f"{argument}: {note}" for note in left_out(finite)]
        sets[argument] = paragraphs[finite]
    return sets["memorized"], sets["control"], tuple(notes)


def _cosines(
    weights: Sequence[Weight], first: Sequence[Tensor], second: Sequence[Tensor]
) -> dict[str, Float[Tensor, "layer head"]]:
    """Component -> cosine of two gradients in every layer and head."""
    cosines = [
        _cosine(weight.split(a), weight.split(b))[None, None]  # one sample, one number
        for weight, a, b in zip(weights, first, second, strict=True)
    ]
    return {name: numbers[0, 0] for name, numbers in stack_layers(weights, cosines).items()}


def _cosine(
    a: Float[Tensor, "head d_in d_out"], b: Float[Tensor, "head d_in d_out"]
) -> Float[Tensor, " head"]:
    """Cosine of two gradients of each head, 0 where one vanishes."""
    scale = a.square().sum((-2, -1)).sqrt() * b.square().sum((-2, -1)).sqrt()
    return (a * b).sum((-2, -1)) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
