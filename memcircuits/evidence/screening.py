"""Attribution first, exact where it matters: the heads that matter without a sweep over all.

Ablating a head changes its z by z' - z, so to first order the loss changes by

    sum over positions and d_head of dL/dz * (z' - z),

for all heads at once from one forward and one backward pass. Where a text is recited that is blind
at the model as it is: each token's probability is near 1, the loss is flat, and heads that hold it
have next to no slope. So the slopes are taken on the way to the model with every head ablated. A
tenth of the way they order heads best where many share a text: `tests/benchmarks/screens.py`. Where
a single head holds all of it the loss may be flat even there, and only halfway is it not:
`memcircuits bench localize`. The heads with the largest slopes at either point are ablated exactly
(`memcircuits.evidence.ablation`), and then whichever estimate ranks among them. Some heads drawn at random
say by how much estimates are off, and so how many like the best ones the screen may have missed.

(Attribution patching: Nanda 2023; its failures and the check by sampling: Kramar et al. 2024,
arXiv 2403.00745; slopes along the way: Sundararajan et al. 2017, arXiv 1703.01365, on circuits
Hanna et al. 2024, arXiv 2403.17806.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.core.errors import one_of
from memcircuits.core.heads import Head
from memcircuits.core.progress import bar
from memcircuits.core.statistics import finite_mean
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.interventions import FALLBACK
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.results.score_map import largest

METHODS = ("exact", "screen")


_BEST = 10  # so many heads of the final ranking are measured exactly


# Measured exactly for their slopes, taken at these shares of the way to all heads ablated: more
# than ten by the first, which is the estimate, as slopes order heads roughly.
_NEAR, _TOP = 0.1, 16


_FAR, _TOP_FAR = 0.5, 4


_RANDOM = 4  # measured exactly to see how good the estimates are


@dataclass(frozen=True)
class HeadEffects:
    """Effects of ablating every head on several sets of paragraphs.

    Attributes:
        nll: set -> change of NLL, nats/token, [paragraph, layer, head]; an estimate where not
            `verified`.
        em: set -> change of EM, tokens, [paragraph, layer, head]; NaN where not `verified`.
        verified: whether the head was ablated exactly, [layer, head].
        notes: what the reader must know.
    """

    nll: Mapping[str, Float[Tensor, "paragraph layer head"]]
    em: Mapping[str, Float[Tensor, "paragraph layer head"]]
    verified: Bool[Tensor, "layer head"]
    notes: tuple[str, ...]


def head_effects(
    memorized: Ablation,
    control: Ablation,
    *,
    method: str = "exact",
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> HeadEffects:
    """Ablate the heads on memorized paragraphs and on controls.

    Args:
        memorized: what is done to the memorized paragraphs.
        control: the same for the controls.
        method: `exact` for every head, or `screen`: estimates for all heads; exact effects for
            the largest of them, for every head that then ranks among the first ten, and for some
            at random.
        seed: of the random heads.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Raises:
        InputError: for another method.
    """
    one_of("method", method, METHODS)
    adapter = memorized.adapter
    sets = {"memorized": memorized, "control": control}
    options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    notes = () if adapter.supports_partial_forward else (FALLBACK,)
    shape = (adapter.n_layers, adapter.n_heads)
    nll: dict[str, Tensor] = {}
    em = {name: torch.full((len(a.paragraphs), *shape), torch.nan) for name, a in sets.items()}
    verified = torch.zeros(shape, dtype=torch.bool)

    def verify(heads: Sequence[Head]) -> None:
        for name, ablation in sets.items():
            found = ablation.effects(heads, **options)
            for i, head in enumerate(heads):
                nll[name][:, *head], em[name][:, *head] = found[:, i].unbind(-1)
        verified[*zip(*heads, strict=True)] = True

    def score(of: Mapping[str, Tensor]) -> Float[Tensor, "layer head"]:
        return finite_mean(of["memorized"]) - finite_mean(of["control"])

    if method == "exact":
        nll = {name: torch.empty_like(found) for name, found in em.items()}
        verify(adapter.heads())
        return HeadEffects(nll, em, verified, notes)

    nll, far = (
        {name: attributions(a, at=at, **options) for name, a in sets.items()}
        for at in (_NEAR, _FAR)
    )
    estimate = score(nll)
    best = list(dict.fromkeys(largest(estimate, _TOP) + largest(score(far), _TOP_FAR)))
    others = [head for head in adapter.heads() if head not in set(best)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(others), generator=generator)[:_RANDOM].tolist()
    random = [others[i] for i in chosen]
    verify(best + random)
    # An exact effect may be smaller than its estimate, so that another head comes up.
    while new := [head for head in largest(score(nll), _BEST) if not verified[head]]:
        verify(new)
    return HeadEffects(nll, em, verified, (*notes, _missed(estimate, score(nll), verified, random)))


def attributions(
    ablation: Ablation,
    *,
    at: float = 0.0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Float[Tensor, "paragraph layer head"]:
    """First-order change of NLL (nats/token) when a head is ablated, for all heads together.

    `at` is where the slopes are taken: 0 at the model as it is, 1 where every head is ablated.
    """
    adapter, paragraphs = ablation.adapter, ablation.paragraphs
    n_pos, n_logits = paragraphs.ids.shape[1], paragraphs.n_continuation
    fit = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    layers = range(adapter.n_layers)

    def one_batch(rows: slice) -> Tensor:
        new = ablation.replacements(rows)
        z: dict[int, Tensor] = {}
        way: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Tensor], Tensor]:
            def hook(old: Tensor) -> Tensor:
                way[layer] = new[layer] - old.detach()
                # What the rest of the pass is computed from.
                z[layer] = (1 - at) * old + at * new[layer]
                return z[layer] if old.requires_grad else z[layer].requires_grad_()

            return hook

        with torch.enable_grad():
            edits = {hook_name("z", layer): keep(layer) for layer in layers}
            nll = score_continuation(adapter, paragraphs, rows, edit=edits).nll.sum()
            slopes = torch.autograd.grad(nll, [z[layer] for layer in layers])
        effects = [(slopes[layer] * way[layer]).float().sum((1, 3)) for layer in layers]
        return torch.stack(effects, 1).cpu()

    with (
        adapter.preserving_state(),
        bar(len(paragraphs), "attribution", progress=progress) as shown,
    ):
        return map_batches(len(paragraphs), fit, one_batch, shown.update)


def _missed(
    estimate: Float[Tensor, "layer head"],
    score: Float[Tensor, "layer head"],
    verified: Bool[Tensor, "layer head"],
    random: Sequence[Head],
) -> str:
    """What the screen may have missed, judged by the heads drawn at random."""
    unseen = int((~verified).sum())
    text = (
        f"Screened: {int(verified.sum())} of {verified.numel()} heads were ablated exactly; the "
        "others carry first-order estimates and no interval."
    )
    if not unseen:
        return text
    error = torch.tensor([float(score[head] - estimate[head]) for head in random])
    bar_to_pass = float(score[verified].sort(descending=True).values[_BEST - 1])
    # An unseen head errs as one of the random heads did: how many would then rank among the best?
    passing = (estimate[~verified][:, None] + error > bar_to_pass).float().mean(-1).sum()
    return text + (
        f" On {len(random)} heads drawn at random the estimate was off by "
        f"{float(error.abs().mean()):.2g} nats/token on average and {float(error.abs().max()):.2g} "
        f"at most; the head ranked {_BEST} has {bar_to_pass:.2g}. If the {unseen} others are off "
        f"alike, {float(passing):.2g} of them belong before it."
    )
