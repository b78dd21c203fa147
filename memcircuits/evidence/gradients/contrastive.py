"""TODO."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import at_least, one_of
from memcircuits.core.progress import bar
from memcircuits.core.statistics import left_out
from memcircuits.data.paragraphs import Paragraphs, refuse_overlap
from memcircuits.evidence.gradients.parameters import (
    POOLS,
    ParameterGradients,
    by_component,
    summarize,
)
from memcircuits.measure.fisher import damped_root, fisher_diagonal
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


def contrastive_gradients(
    model: Any,
    memorized: Any,
    control: Any,
    *,
    curvature: bool = True,
    n_control: int = 10,
    draws: int = 8,
    pool: str = "max",
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the contrastive objective (equation 3), paragraph by paragraph.

    Each memorized paragraph is set against its own random batch of controls. The KL term has no
    gradient at the original weights (see the module's text): it enters by its curvature.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs to forget.
        control: paragraphs to keep.
        curvature: divide by the root of the controls' Fisher information; False gives the gradient
            of the objective itself, which does not depend on the controls.
        n_control: controls for each memorized paragraph.
        draws: label draws of the Fisher estimate (relative error sqrt(2 / draws) per weight).
        pool: `max`, `mean` or `l2` over the weights of a component.
        seed: of the draws of controls and labels.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` with one sample per memorized paragraph, and `cosine` between the mean
        NLL gradients of memorized and control paragraphs. The constant before the NLL is left out.

    Raises:
        InputError: for unusable paragraphs or controls that are in the memorized set.
    """
    one_of("pool", pool, POOLS)
    at_least("n_control", n_control, 1)
    at_least("draws", draws, 1)
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    control = Paragraphs.of(control, model, "control")
    adapter.check_tokens(memorized.ids, "memorized")
    adapter.check_tokens(control.ids, "control")
    refuse_overlap(memorized, control, same="prefix")
    finite = has_finite_scores(adapter, memorized, "memorized", memory_budget)
    finite_control = has_finite_scores(adapter, control, "control", memory_budget)
    notes = (
        *(f"memorized: {note}" for note in left_out(finite)),
        *(f"control: {note}" for note in left_out(finite_control)),
    )
    memorized, control = memorized[finite], control[finite_control]
    weights = adapter.weights()
    generator = torch.Generator().manual_seed(seed)
    _, of_control = mean_gradient(adapter, control, weights, memory_budget, progress)
    loss = 0.0
    total = [torch.zeros_like(g) for g in of_control]
    tables: list[dict[str, Tensor]] = []
    with bar(len(memorized), "contrast", progress=progress) as shown:
        for paragraph in memorized:
            nll, gradients = mean_gradient(adapter, paragraph, weights, memory_budget, False)
            loss += nll / len(memorized)
            for t, g in zip(total, gradients, strict=True):
                t += g / len(memorized)
            if curvature:
                chosen = torch.randperm(len(control), generator=generator)[:n_control]
                fisher = fisher_diagonal(
                    adapter, control[chosen], weights, draws, generator, memory_budget
                )
                roots = damped_root(fisher)
                gradients = [g / root for g, root in zip(gradients, roots, strict=True)]
            rows = [
                summarize(w.split(g), pool)[None] for w, g in zip(weights, gradients, strict=True)
            ]
            tables.append(by_component(weights, rows))
            shown.update()
    table = {name: torch.cat([t[name] for t in tables]) for name in tables[0]}
    cosines = [
        _cosine(w.split(a), w.split(b))[None, None]
        for w, a, b in zip(weights, total, of_control, strict=True)
    ]
    return ParameterGradients(
        values={name: t[:, 0].mean(0) for name, t in table.items()},
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
        samples={name: t[:, 0].contiguous() for name, t in table.items()},
        statistics={name: t[:, 1:].mean(0) for name, t in table.items()},
        cosine={name: t[0, 0] for name, t in by_component(weights, cosines).items()},
        notes=notes,
    )


def _cosine(a: Tensor, b: Tensor) -> Float[Tensor, " head"]:
    """Cosine of two gradients, 0 where one vanishes."""
    scale = a.square().sum((-2, -1)).sqrt() * b.square().sum((-2, -1)).sqrt()
    return (a * b).sum((-2, -1)) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
