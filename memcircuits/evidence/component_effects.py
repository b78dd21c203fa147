"""What happens without each component, on memorized paragraphs and on controls?

1. Some paragraphs of each set are the *pilot*: on them effects are estimated, where that is asked
   for (`memcircuits.evidence.screening`), and levels are compared (`memcircuits.evidence.levels`).
2. Components are ablated exactly (`memcircuits.evidence.ablation`): all of them, or those that the
   screen chooses; of neurons always those that it chooses.
3. Paragraphs with numbers that are not finite are left out, and those that depend on each other are
   averaged (`memcircuits.base.statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.errors import InputError
from memcircuits.base.statistics import finite_mean, finite_rows, group_means, left_out
from memcircuits.evidence.ablation import MEASURES, Ablation
from memcircuits.evidence.component_grid import ComponentGrid
from memcircuits.evidence.interventions import FALLBACK
from memcircuits.evidence.levels import level_effects
from memcircuits.evidence.screening import (
    PILOT,
    SIZES,
    Estimates,
    Method,
    expected_before,
)


@dataclass(frozen=True)
class ComponentEffects:
    """Effects of ablating components on both sets of paragraphs.

    Attributes:
        grid: the components that are ranked.
        components: those that were ablated exactly.
        samples: set (`memorized`, `control`) -> change of NLL, EM and margin, one row for each
            independent group of paragraphs, [group, component, measure].
        estimate: memorized minus control, nats/token, where it was estimated, else NaN.
        levels: see `memcircuits.evidence.levels.level_effects`.
        notes: what the reader must know.
    """

    grid: ComponentGrid
    components: tuple[Component, ...]
    samples: Mapping[str, Float[Tensor, "group component measure"]]
    estimate: Float[Tensor, "layer column"]
    levels: Mapping[str, Float[Tensor, " quantity"]]
    notes: tuple[str, ...]

    @property
    def verified(self) -> Bool[Tensor, "layer column"]:
        """Which components were ablated exactly."""
        return self.grid.mask(self.components)

    def on_grid(
        self, values: Float[Tensor, " component"], fill: float = torch.nan
    ) -> Float[Tensor, "layer column"]:
        """Values of the components that were ablated as a grid; `fill` elsewhere."""
        grid = torch.full((self.grid.n_layers, self.grid.width), fill)
        for component, value in zip(self.components, values.float(), strict=True):
            grid[self.grid.place(component)] = value
        return grid

    def means(self, name: str) -> dict[str, Float[Tensor, "layer column"]]:
        """Mean change of each measure in a set, NaN where not ablated."""
        means = self.samples[name].mean(0)
        return {measure: self.on_grid(means[:, i]) for i, measure in enumerate(MEASURES)}

    def nll_of_groups(self, name: str) -> Float[Tensor, "group layer column"]:
        """Change of the NLL in each group of a set, NaN where not ablated; without neurons."""
        width = len(self.grid.map_names())
        return torch.stack([self.on_grid(row)[:, :width] for row in self.samples[name][..., 0]])


def measure_effects(
    memorized: Ablation,
    control: Ablation,
    grid: ComponentGrid,
    *,
    method: Method = "exact",
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ComponentEffects:
    """Ablate the components of a grid on memorized paragraphs and on controls.

    Args:
        memorized: the ablation of the memorized paragraphs.
        control: the ablation of the controls.
        grid: the components.
        method: see `Method`.
        seed: seed of all draws.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Raises:
        InputError: if fewer than one memorized paragraph or two controls have finite effects.
    """
    options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    ablations = {"memorized": memorized, "control": control}
    generator = torch.Generator().manual_seed(seed)
    pilot = {}
    for name, ablation in ablations.items():
        drawn = torch.randperm(len(ablation.paragraphs), generator=generator)[:PILOT]
        pilot[name] = drawn.sort().values
    measured = _Measured(ablations, grid, options)
    notes = () if memorized.adapter.supports_partial_forward else (FALLBACK,)
    estimates = None
    if method == "screen" or "neuron" in grid.units:
        estimates = Estimates(ablations, pilot, grid, generator, **options)
        measured.estimate = estimates.scores()
    neurons, drawn_neurons = _choose_neurons(grid, estimates, method)
    if method == "exact":
        chosen = [c for unit in grid.units if unit != "neuron" for c in grid.components(unit)]
        measured.ablate([*chosen, *neurons, *drawn_neurons])
    elif estimates is not None:
        notes = (*notes, *_screen(measured, estimates, [*neurons, *drawn_neurons]))
    if neurons:
        notes = (*notes, _note_on_neurons(measured, neurons, drawn_neurons))
    singles = {
        name: measured.rows(name, pilot[name], None if estimates is None else estimates.rows[name])
        for name in ablations
    }
    levels = level_effects(ablations, pilot, grid, singles, neurons, generator, **options)
    samples, finite_notes = measured.finite_samples()
    return ComponentEffects(
        grid, tuple(measured.components), samples, measured.estimate, levels, notes + finite_notes
    )


class _Measured:
    """The components ablated so far, and their effects on every paragraph."""

    def __init__(
        self, ablations: Mapping[str, Ablation], grid: ComponentGrid, options: Mapping[str, Any]
    ) -> None:
        self.grid, self.components = grid, list[Component]()
        self.estimate = torch.full((grid.n_layers, grid.width), torch.nan)
        self._ablations, self._options = ablations, options
        self._samples = {
            name: torch.empty(len(ablation.paragraphs), 0, len(MEASURES))
            for name, ablation in ablations.items()
        }

    def ablate(self, components: Sequence[Component]) -> None:
        """Ablate further components."""
        new = _without(list(dict.fromkeys(components)), self.components)
        if not new:
            return
        self.components += new
        for name, ablation in self._ablations.items():
            effects = ablation.effects([[component] for component in new], **self._options)
            self._samples[name] = torch.cat([self._samples[name], effects.float()], 1)

    def scores(self) -> Float[Tensor, "layer column"]:
        """Memorized minus control, nats/token: exact where ablated, else estimated."""
        means = {
            name: finite_mean(samples[..., 0], self._ablations[name].paragraphs.groups)
            for name, samples in self._samples.items()
        }
        scores = self.estimate.clone()
        for i, component in enumerate(self.components):
            scores[self.grid.place(component)] = means["memorized"][i] - means["control"][i]
        return scores

    def rows(
        self, name: str, rows: Tensor, estimates: Float[Tensor, "row layer column"] | None
    ) -> Float[Tensor, "row layer column"]:
        """Changes of the NLL of some paragraphs of a set: exact where ablated, else estimated."""
        if estimates is None:
            values = torch.full((len(rows), self.grid.n_layers, self.grid.width), torch.nan)
        else:
            values = estimates.clone()
        for i, component in enumerate(self.components):
            values[(slice(None), *self.grid.place(component))] = self._samples[name][rows, i, 0]
        return values

    def finite_samples(self) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Effects of each independent group of paragraphs, and notes on what was left out."""
        samples, notes = {}, []
        for name, minimum in {"memorized": 1, "control": 2}.items():
            # An ablation may overflow where the whole model does not.
            finite = finite_rows(self._samples[name])
            notes += [f"{name}: {note}" for note in left_out(finite)]
            if finite.sum() < minimum:
                raise InputError(name, "non-finite numbers when parts are ablated", "use float32")
            groups = self._ablations[name].paragraphs.groups[finite]
            samples[name] = group_means(self._samples[name][finite], groups)
        return samples, tuple(notes)


def _choose_neurons(
    grid: ComponentGrid, estimates: Estimates | None, method: Method
) -> tuple[list[Component], list[Component]]:
    """The neurons with the largest estimates, and some drawn at random."""
    if estimates is None or "neuron" not in grid.units:
        return [], []
    n_best, n_random = SIZES.neurons_of_exact, SIZES.random
    if method == "screen":
        n_best, n_random = SIZES.neurons, SIZES.random_neurons
    best = estimates.neurons(n_best)
    return best, estimates.random(_without(grid.components("neuron"), best), n_random)


def _screen(
    measured: _Measured, estimates: Estimates, neurons: Sequence[Component]
) -> tuple[str, ...]:
    """Ablate the best and some random components, and the neurons; what may have been missed."""
    grid = measured.grid
    best = estimates.best()
    everything = [c for unit in grid.units if unit != "neuron" for c in grid.components(unit)]
    others = _without(everything, best)
    random = estimates.random_others(others)
    measured.ablate([*best, *random, *neurons])
    # An exact effect may be smaller than its estimate, so that another component comes up.
    while new := estimates.coming_up(measured.scores(), measured.components):
        measured.ablate(new)
    if not everything:
        return ()
    noun = "heads" if grid.units == ("head",) else "components"
    unverified = _without(everything, measured.components)
    text = (
        f"Screened: {len(everything) - len(unverified)} of {len(everything)} {noun} were ablated "
        f"exactly; the others carry estimates from at most {PILOT} paragraphs of each set (heads "
        "to first order), and no interval."
    )
    if not unverified:
        return (text,)
    scores, verified = measured.scores(), _without(everything, unverified)
    exact = sorted((float(scores[grid.place(c)]) for c in verified), reverse=True)
    last = exact[min(SIZES.ranked, len(exact)) - 1]
    return (f"{text} {_errors(measured, random, unverified, last, SIZES.ranked, noun)}",)


def _note_on_neurons(
    measured: _Measured, neurons: Sequence[Component], random: Sequence[Component]
) -> str:
    """How many neurons were ablated, and what may have been missed."""
    grid = measured.grid
    everything = grid.components("neuron")
    unverified = _without(everything, measured.components)
    text = (
        f"{len(neurons)} of {len(everything)} neurons were ablated exactly for their estimates; "
        "the others have an estimate and no interval."
    )
    if not unverified:
        return text
    scores = measured.scores()
    last = min(float(scores[grid.place(neuron)]) for neuron in neurons)
    return f"{text} {_errors(measured, random, unverified, last, len(neurons), 'neurons')}"


def _without(components: Sequence[Component], known: Sequence[Component]) -> list[Component]:
    excluded = set(known)
    return [component for component in components if component not in excluded]


def _errors(
    measured: _Measured,
    random: Sequence[Component],
    unverified: Sequence[Component],
    last: float,
    rank: int,
    noun: str,
) -> str:
    """How far estimates were off, and how many components may therefore be misplaced."""
    grid, scores = measured.grid, measured.scores()
    places = [grid.place(component) for component in random]
    error = torch.tensor([float(scores[p] - measured.estimate[p]) for p in places])
    estimated = torch.tensor([float(measured.estimate[grid.place(c)]) for c in unverified])
    return (
        f"On {len(random)} {noun} drawn at random the estimate was off by "
        f"{float(error.abs().mean()):.2g} nats/token on average and {float(error.abs().max()):.2g} "
        f"at most; the {noun.removesuffix('s')} ranked {rank} has {last:.2g}. If the "
        f"{len(unverified)} others are off by as much, "
        f"{expected_before(estimated, error, last):.2g} of them belong before it."
    )
