"""Screening: estimate the effect of ablating every component, and ablate only the best exactly.

Ablating a head changes its z, and ablating a neuron its activation, from a to a', so to first order
the loss changes by

    sum over positions and dimensions of dL/da * (a' - a)

for all heads and neurons at once, from one forward and one backward pass. At the model as it is,
this estimate fails on recited text: each token's probability is near 1, the loss is flat, and the
gradient at the heads that the recitation depends on is close to zero. The gradient is therefore
taken at points on the straight line from the model to the model with every head ablated:

* at a tenth of the way, where the estimates order heads best if many heads contribute to a
  recitation (`tests/benchmarks/screens.py`);
* at half of the way, because the loss may still be flat at a tenth if one head holds the whole
  recitation (`memcircuits bench localize`).

For MLPs and layers, whose effects are too large for a slope, the estimate is their exact effect on
few paragraphs. All estimates are made on `PILOT` paragraphs of each set. The components with the
largest estimates at either point are ablated exactly (`memcircuits.evidence.ablation`) on all
paragraphs. If another component's estimate then ranks among the first ten, that one is ablated too,
until the first ten are all exact. A few components drawn at random are ablated as well: their
errors say how many of those that were not ablated may belong among the first ten.

Neurons are always screened, as a model has tens of thousands. Those whose ablation costs most
log(p / (1 - p)), by its slope at the model as it is, are ablated, each by itself, and so are some
drawn at random; the largest are ablated together, too. These log-odds are not flat where p is near
1: of the neurons that hold a planted paragraph their slope finds more than that of the loss
(`memcircuits bench localize`, kind `neurons`).

Sources: attribution patching, Nanda 2023; its failures and the check by sampling, Kramar et al.
2024 (arXiv 2403.00745); gradients along the way, Sundararajan et al. 2017 (arXiv 1703.01365) and,
on circuits, Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_mean
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.component_grid import ComponentGrid, RankedUnit
from memcircuits.measure.continuation import Measured, continuation_logits, harm
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import Site, hook_name
from memcircuits.results.score_map import largest

Method: TypeAlias = Literal["exact", "screen"]
"""Ablate every component exactly, or estimate all effects and ablate the best exactly."""

PILOT = 16
"""Maximum number of paragraphs of each set that estimates are made on."""

_SITES: dict[RankedUnit, Site] = {"head": "z", "neuron": "post"}
"""The units with slopes, and the activation of each."""

_EXACT: tuple[RankedUnit, ...] = ("mlp", "layer")


@dataclass(frozen=True)
class ScreenSizes:
    """How many components a screen ablates exactly, and where it takes its gradients.

    Attributes:
        ranked: number of components at the top of the final ranking that must all be exact.
        near: the first point, as a fraction of the way to all heads ablated; its estimates are the
            ones reported.
        near_best: number of heads ablated for their estimates at `near`: more than `ranked`,
            because estimates order them only roughly.
        near_best_of_several: the same where other components are ranked, too: those cost runs of
            their own.
        far: the second point.
        far_best: number of components ablated for their estimates at `far`.
        random: number of heads, and by the method `exact` of neurons, that are drawn at random and
            ablated to see how large the errors of estimates are.
        random_of_several: the same where other components are ranked, too.
        neurons: number of neurons that the method `screen` ablates for their estimates.
        random_neurons: number of neurons that it draws at random.
        neurons_of_exact: number of neurons that the method `exact` ablates for their estimates.
    """

    ranked: int = 10
    near: float = 0.1
    near_best: int = 16
    near_best_of_several: int = 10
    far: float = 0.5
    far_best: int = 4
    random: int = 4
    random_of_several: int = 3
    neurons: int = 3
    random_neurons: int = 2
    neurons_of_exact: int = 32


SIZES = ScreenSizes()


class Estimates:
    """Estimated effects of all components, and the components chosen by them.

    Args:
        ablations: set (`memorized`, `control`) -> its ablation.
        pilot: set -> indices of the paragraphs that estimates are made on.
        grid: the components.
        generator: draws components at random.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Attributes:
        rows: set -> estimates at `near`, nats/token, [row, layer, column].
    """

    def __init__(
        self,
        ablations: Mapping[str, Ablation],
        pilot: Mapping[str, Int[Tensor, " row"]],
        grid: ComponentGrid,
        generator: torch.Generator,
        *,
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        self._ablations, self._pilot, self._grid = ablations, pilot, grid
        self._generator = generator
        self._options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
        self._exact = self._on_the_pilot()
        self.rows = self._at(SIZES.near)

    def _on_the_pilot(self) -> dict[str, Float[Tensor, "row layer column"]]:
        """Exact effects of MLPs and layers on the pilot, NaN for other components."""
        units = [unit for unit in self._grid.units if unit in _EXACT]
        parts = [part for unit in units for part in self._grid.components(unit)]
        shape = (self._grid.n_layers, self._grid.width)
        effects = {}
        for name, ablation in self._ablations.items():
            rows = self._pilot[name]
            effects[name] = torch.full((len(rows), *shape), torch.nan)
            if parts:
                measured = ablation.effects(parts, rows, **self._options)[..., 0].float()
                for i, part in enumerate(parts):
                    effects[name][(slice(None), *self._grid.place(part))] = measured[:, i]
        return effects

    def _at(self, point: float) -> dict[str, Float[Tensor, "row layer column"]]:
        """Slopes at a point on the way, and the exact effects of what has none."""
        return {
            name: torch.where(slopes.isnan(), self._exact[name], slopes)
            for name, slopes in self._slopes(point).items()
        }

    def _slopes(
        self, point: float, measured: Measured = "nll"
    ) -> dict[str, Float[Tensor, "row layer column"]]:
        options = {"at": point, "measured": measured, **self._options}
        return {
            name: attributions(ablation, self._grid, self._pilot[name], **options)
            for name, ablation in self._ablations.items()
        }

    def scores(
        self, rows: Mapping[str, Float[Tensor, "row layer column"]] | None = None
    ) -> Float[Tensor, "layer column"]:
        """Memorized minus control; each independent group of paragraphs counts once."""
        means = {
            name: finite_mean(effects, self._ablations[name].paragraphs.groups[self._pilot[name]])
            for name, effects in (self.rows if rows is None else rows).items()
        }
        return means["memorized"] - means["control"]

    def best(self) -> list[Component]:
        """The components other than neurons with the largest estimates at either point."""
        only_heads = self._grid.units == ("head",)
        n_near = SIZES.near_best if only_heads else SIZES.near_best_of_several
        near = self._largest(self._others(self.scores()), n_near)
        far = self._largest(self._others(self.scores(self._at(SIZES.far))), SIZES.far_best)
        return list(dict.fromkeys(near + far))

    def neurons(self, k: int) -> list[Component]:
        """The `k` neurons whose ablation costs the most log-odds by their slopes."""
        columns = self._grid.columns("neuron")
        slopes = self._slopes(0.0, "log-odds")
        scores = torch.full((self._grid.n_layers, self._grid.width), torch.nan)
        # Neurons alone: a row with the NaN of an MLP, which has no slope, would be left out.
        scores[:, columns] = self.scores(
            {name: rows[..., columns] for name, rows in slopes.items()}
        )
        return self._largest(scores, k)

    def random_others(self, among: Sequence[Component]) -> list[Component]:
        """Some of the components other than neurons, drawn at random."""
        only_heads = self._grid.units == ("head",)
        return self.random(among, SIZES.random if only_heads else SIZES.random_of_several)

    def random(self, among: Sequence[Component], k: int) -> list[Component]:
        """`k` of some components, drawn at random."""
        drawn = torch.randperm(len(among), generator=self._generator)[:k]
        return [among[i] for i in drawn.tolist()]

    def coming_up(
        self, scores: Float[Tensor, "layer column"], known: Sequence[Component]
    ) -> list[Component]:
        """Components that rank among the first by their estimates, and are not known exactly.

        Args:
            scores: exact ones where known, else estimates.
            known: the components whose scores are exact.
        """
        first = self._largest(self._others(scores), SIZES.ranked)
        return [component for component in first if component not in set(known)]

    def _others(self, scores: Float[Tensor, "layer column"]) -> Float[Tensor, "layer column"]:
        """The scores without those of neurons."""
        scores = scores.clone()
        scores[:, self._grid.columns("neuron")] = torch.nan
        return scores

    def _largest(self, scores: Float[Tensor, "layer column"], k: int) -> list[Component]:
        return [self._grid.component(*place) for place in largest(scores, k)]


def attributions(
    ablation: Ablation,
    grid: ComponentGrid | None = None,
    rows: Int[Tensor, " row"] | None = None,
    *,
    at: float = 0.0,
    measured: Measured = "nll",
    memory_budget: int | None = None,
    progress: bool = True,
) -> Float[Tensor, "row layer column"]:
    """First-order harm (nats/token) when a component is ablated, for all at once.

    Args:
        ablation: the ablation.
        grid: the components; by default all heads. Those other than heads and neurons are NaN.
        rows: indices of the paragraphs; by default all.
        at: where the gradient is taken, as a fraction of the way from the model as it is (0) to
            the model with every head ablated (1).
        measured: what harm is: the rise of the NLL or the fall of the log-odds.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.
    """
    adapter, paragraphs = ablation.adapter, ablation.paragraphs
    grid = ComponentGrid.of(adapter, ("head",)) if grid is None else grid
    rows = torch.arange(len(paragraphs)) if rows is None else rows
    n_pos, n_logits = paragraphs.inputs.shape[1], paragraphs.n_continuation
    size = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    layers = range(adapter.n_layers)
    # Heads are moved towards their ablation in any case.
    units = [unit for unit in _SITES if unit == "head" or unit in grid.units]
    names = {unit: [hook_name(_SITES[unit], layer) for layer in layers] for unit in units}
    all_names = [name for of_unit in names.values() for name in of_unit]

    def attribute_batch(batch: slice) -> Float[Tensor, "batch layer column"]:
        n_rows = len(rows[batch])
        new = ablation.replacements(all_names, rows[batch])
        change: dict[str, Tensor] = {}  # a' - a
        moved: dict[str, Tensor] = {}  # a at the point where the gradient is taken

        def move(name: str) -> Callable[[Tensor], Tensor]:
            def hook(activation: Tensor) -> Tensor:
                # Some models hand their MLPs all positions in one axis.
                shaped = activation.view(n_rows, n_pos - 1, *_rest(name, activation))
                change[name] = new[name] - shaped.detach()
                step = at if name.endswith("hook_z") else 0.0
                # The rest of the pass is computed from the tensor that is returned.
                there = (1 - step) * shaped + step * new[name]
                moved[name] = there if there.requires_grad else there.requires_grad_()
                return moved[name].view(activation.shape)

            return hook

        with torch.enable_grad():
            edit = {name: move(name) for name in all_names}
            logits = continuation_logits(adapter, paragraphs, rows[batch], edit=edit)
            targets = paragraphs.continuation[rows[batch]].to(logits.device)
            total = harm(measured, logits, targets).sum()
            gradients = torch.autograd.grad(total, [moved[name] for name in all_names])
        of_name = {
            name: (gradient * change[name]).float().sum((1, 3) if gradient.ndim == 4 else 1)
            for name, gradient in zip(all_names, gradients, strict=True)
        }
        effects = torch.full((n_rows, adapter.n_layers, grid.width), torch.nan)
        for unit in units:
            if unit in grid.units:
                of_unit = torch.stack([of_name[name] for name in names[unit]], 1)
                effects[:, :, grid.columns(unit)] = of_unit.cpu()
        return effects

    with (
        adapter.preserving_state(),
        bar(len(rows), "attribution", progress=progress) as progress_bar,
    ):
        return map_batches(len(rows), size, attribute_batch, progress_bar.update)


def _rest(name: str, activation: Tensor) -> tuple[int, ...]:
    """The axes behind batch and position."""
    return tuple(activation.shape[-2:] if name.endswith("hook_z") else activation.shape[-1:])


def expected_before(
    estimates: Float[Tensor, " component"], errors: Float[Tensor, " random"], bound: float
) -> float:
    """How many components would be above `bound` if they erred as those drawn at random did."""
    if not (len(estimates) and len(errors)):
        return 0.0
    return float((estimates[:, None] + errors > bound).float().mean(-1).sum())
