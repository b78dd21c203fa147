"""Screening: estimate the effect of ablating every head, and ablate only the best heads exactly.

Ablating a head changes its z by z' - z, so to first order the loss changes by

    sum over positions and d_head of dL/dz * (z' - z)

for all heads at once, from one forward and one backward pass. At the model as it is, this estimate
fails on recited text: each token's probability is near 1, the loss is flat, and the gradient at the
heads that the recitation depends on is close to zero. The gradient is therefore taken at points on
the straight line from the model to the model with every head ablated:

* at a tenth of the way, where the estimates order heads best if many heads contribute to a
  recitation (`tests/benchmarks/screens.py`);
* at half of the way, because the loss may still be flat at a tenth if one head holds the whole
  recitation (`memcircuits bench localize`).

The heads with the largest estimates at either point are ablated exactly
(`memcircuits.evidence.ablation`). If another head's estimate then ranks among the first ten, that
head is ablated too, until the first ten are all exact. A few heads drawn at random are ablated as
well: their errors say how many of the heads that were not ablated may belong among the first ten.

Sources: attribution patching, Nanda 2023; its failures and the check by sampling, Kramar et al.
2024 (arXiv 2403.00745); gradients along the way, Sundararajan et al. 2017 (arXiv 1703.01365) and,
on circuits, Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.errors import one_of
from memcircuits.base.heads import Head
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_mean
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.interventions import FALLBACK
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.results.score_map import largest

Method: TypeAlias = Literal["exact", "screen"]
"""Ablate every head exactly, or estimate all effects and ablate the best heads exactly."""


@dataclass(frozen=True)
class ScreenSizes:
    """How many heads a screen ablates exactly, and where it takes its gradients.

    Attributes:
        ranked: number of heads at the top of the final ranking that must all be exact.
        near: the first point, as a fraction of the way to all heads ablated; its estimates are the
            ones reported.
        near_heads: number of heads ablated for their estimates at `near`: more than `ranked`,
            because estimates order heads only roughly.
        far: the second point.
        far_heads: number of heads ablated for their estimates at `far`.
        random_heads: number of heads ablated to see how large the errors of estimates are.
    """

    ranked: int = 10
    near: float = 0.1
    near_heads: int = 16
    far: float = 0.5
    far_heads: int = 4
    random_heads: int = 4


SIZES = ScreenSizes()


@dataclass(frozen=True)
class HeadEffects:
    """Effects of ablating every head on several sets of paragraphs.

    Attributes:
        nll: set -> change of NLL, nats/token, [paragraph, layer, head], or one row per independent
            group where those were averaged; an estimate where not `verified`.
        em: set -> change of EM, tokens, likewise; NaN where not `verified`.
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
    method: Method = "exact",
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> HeadEffects:
    """Ablate the heads on memorized paragraphs and on controls.

    Args:
        memorized: the ablation of the memorized paragraphs.
        control: the ablation of the controls.
        method: see `Method`.
        seed: seed of the draw of random heads.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Raises:
        InputError: for another method.
    """
    one_of("method", method, get_args(Method))
    adapter = memorized.adapter
    measured = _MeasuredHeads({"memorized": memorized, "control": control}, memory_budget, progress)
    notes = () if adapter.supports_partial_forward else (FALLBACK,)
    if method == "exact":
        measured.ablate(adapter.heads())
    else:
        notes = (*notes, _screen(measured, seed))
    return HeadEffects(measured.nll, measured.em, measured.verified, notes)


class _MeasuredHeads:
    """The effects known so far; `ablate` replaces estimates by exact effects."""

    def __init__(
        self, ablations: Mapping[str, Ablation], memory_budget: int | None, progress: bool
    ) -> None:
        self.ablations = ablations
        self.memory_budget = memory_budget
        self.progress = progress
        self.adapter = ablations["memorized"].adapter
        shape = (self.adapter.n_layers, self.adapter.n_heads)
        self.nll = self._empty(shape)
        self.em = self._empty(shape)
        self.verified = torch.zeros(shape, dtype=torch.bool)

    def _empty(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {
            name: torch.full((len(ablation.paragraphs), *shape), torch.nan)
            for name, ablation in self.ablations.items()
        }

    def estimate(self, at: float) -> dict[str, Float[Tensor, "paragraph layer head"]]:
        """First-order effects of all heads on each set."""
        return {
            name: attributions(
                ablation, at=at, memory_budget=self.memory_budget, progress=self.progress
            )
            for name, ablation in self.ablations.items()
        }

    def ablate(self, heads: Sequence[Head]) -> None:
        """Measure some heads exactly on every set."""
        for name, ablation in self.ablations.items():
            effects = ablation.effects(
                heads, memory_budget=self.memory_budget, progress=self.progress
            )
            for column, head in enumerate(heads):
                self.nll[name][:, *head], self.em[name][:, *head] = effects[:, column].unbind(-1)
        self.verified[*zip(*heads, strict=True)] = True

    def score(self) -> Float[Tensor, "layer head"]:
        """Memorized minus control effect, estimated where not verified."""
        return self.score_of(self.nll)

    def score_of(self, nll: Mapping[str, Tensor]) -> Float[Tensor, "layer head"]:
        """Memorized minus control effect; each independent group of paragraphs counts once."""
        means = {
            name: finite_mean(nll[name], ablation.paragraphs.groups)
            for name, ablation in self.ablations.items()
        }
        return means["memorized"] - means["control"]


def _screen(measured: _MeasuredHeads, seed: int) -> str:
    """Estimate all heads, ablate the best and some random ones; the note about what was missed."""
    # Estimates of all heads, at both points.
    measured.nll = measured.estimate(SIZES.near)
    estimate = measured.score()
    far_estimate = measured.score_of(measured.estimate(SIZES.far))
    best = largest(estimate, SIZES.near_heads) + largest(far_estimate, SIZES.far_heads)
    best = list(dict.fromkeys(best))

    # Random heads among the others say how large the errors are.
    others = [head for head in measured.adapter.heads() if head not in set(best)]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(others), generator=generator)[: SIZES.random_heads]
    random = [others[i] for i in drawn.tolist()]
    measured.ablate(best + random)

    # An exact effect may be smaller than its estimate, so that another head comes up.
    while new := [h for h in largest(measured.score(), SIZES.ranked) if not measured.verified[h]]:
        measured.ablate(new)
    return _screen_note(estimate, measured.score(), measured.verified, random)


def attributions(
    ablation: Ablation,
    *,
    at: float = 0.0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Float[Tensor, "paragraph layer head"]:
    """First-order change of NLL (nats/token) when a head is ablated, for all heads at once.

    Args:
        ablation: the ablation.
        at: where the gradient is taken, as a fraction of the way from the model as it is (0) to
            the model with every head ablated (1).
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.
    """
    adapter, paragraphs = ablation.adapter, ablation.paragraphs
    n_pos, n_logits = paragraphs.inputs.shape[1], paragraphs.n_continuation
    size = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    layers = range(adapter.n_layers)

    def attribute_batch(rows: slice) -> Tensor:
        new_z = ablation.replacements(rows)
        change: dict[int, Tensor] = {}  # layer -> z' - z
        moved_z: dict[int, Tensor] = {}  # layer -> z at the point where the gradient is taken

        def move(layer: int) -> Callable[[Tensor], Tensor]:
            def hook(z: Tensor) -> Tensor:
                change[layer] = new_z[layer] - z.detach()
                # The rest of the pass is computed from the tensor that is returned.
                moved_z[layer] = (1 - at) * z + at * new_z[layer]
                return moved_z[layer] if z.requires_grad else moved_z[layer].requires_grad_()

            return hook

        with torch.enable_grad():
            edit = {hook_name("z", layer): move(layer) for layer in layers}
            nll = score_continuation(adapter, paragraphs, rows, edit=edit).nll.sum()
            grads = torch.autograd.grad(nll, [moved_z[layer] for layer in layers])
        effects = [(grads[layer] * change[layer]).float().sum((1, 3)) for layer in layers]
        return torch.stack(effects, 1).cpu()

    with (
        adapter.preserving_state(),
        bar(len(paragraphs), "attribution", progress=progress) as progress_bar,
    ):
        return map_batches(len(paragraphs), size, attribute_batch, progress_bar.update)


def _screen_note(
    estimate: Float[Tensor, "layer head"],
    score: Float[Tensor, "layer head"],
    verified: Bool[Tensor, "layer head"],
    random: Sequence[Head],
) -> str:
    """What the screen may have missed, judged by the heads drawn at random."""
    n_unverified = int((~verified).sum())
    text = (
        f"Screened: {int(verified.sum())} of {verified.numel()} heads were ablated exactly; the "
        "others carry first-order estimates and no interval."
    )
    if not n_unverified:
        return text
    error = torch.tensor([float(score[head] - estimate[head]) for head in random])
    last_ranked = float(score[verified].sort(descending=True).values[SIZES.ranked - 1])
    # If the others err as the random heads did, how many of them would rank among the first?
    expected = (estimate[~verified][:, None] + error > last_ranked).float().mean(-1).sum()
    return text + (
        f" On {len(random)} heads drawn at random the estimate was off by "
        f"{float(error.abs().mean()):.2g} nats/token on average and {float(error.abs().max()):.2g} "
        f"at most; the head ranked {SIZES.ranked} has {last_ranked:.2g}. If the {n_unverified} "
        f"others are off by as much, {float(expected):.2g} of them belong before it."
    )
