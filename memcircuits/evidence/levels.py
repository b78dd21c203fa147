"""How much of the recitation lies in heads, and how much in MLPs?

A level is a sort of component: the heads, the MLPs, the neurons that were ablated, and `all` heads
and MLPs. For each one:

* *sum*: the effects of its components, each ablated by itself, added up;
* *joint*: the effect of ablating all of them together;
* *interaction*: joint minus sum. It is large where components stand in for each other, or where
  one works on what another one wrote; then no sum of single effects says what a level is worth;
* *share*: the level's sum as a share of that of all heads and MLPs.

Effects are those of the NLL, memorized minus control, nats/token, on at most
`memcircuits.evidence.screening.PILOT` paragraphs of each set. After a screen, heads that were not
ablated enter sums with their first-order estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.statistics import bootstrap_means, finite_rows, group_means, interval
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.component_grid import ComponentGrid

if TYPE_CHECKING:
    import pandas as pd

LEVEL_QUANTITIES = ("sum", "joint", "share", "share_low", "share_high")
"""What is kept of each level: nats/token, and shares of 1 with their 95 % interval."""

_DRAWS = 1000


def level_effects(
    ablations: Mapping[str, Ablation],
    pilot: Mapping[str, Int[Tensor, " row"]],
    grid: ComponentGrid,
    singles: Mapping[str, Float[Tensor, "row layer column"]],
    neurons: list[Component],
    generator: torch.Generator,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> dict[str, Float[Tensor, " quantity"]]:
    """Level -> its `LEVEL_QUANTITIES`; nothing where heads are not ranked.

    Args:
        ablations: set (`memorized`, `control`) -> its ablation.
        pilot: set -> indices of the paragraphs that are measured.
        grid: the components that are ranked.
        singles: set -> effect of each component by itself on these paragraphs, nats/token.
        neurons: the neurons that are ablated together.
        generator: draws the resamples.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.
    """
    if "head" not in grid.units:
        return {}
    adapter = ablations["memorized"].adapter
    heads = [Component("head", *head) for head in adapter.heads()]
    mlps = [Component("mlp", layer) for layer in range(adapter.n_layers)]
    joint = {"head": heads, "mlp": mlps, "all": heads + mlps}
    if neurons:
        joint["neuron"] = neurons
    unranked = [] if "mlp" in grid.units else mlps
    sets = [*joint.values(), *([mlp] for mlp in unranked)]
    per_set = []
    for name, ablation in ablations.items():
        effects = ablation.effects(
            sets, pilot[name], memory_budget=memory_budget, progress=progress
        )[..., 0].double()
        together, alone = effects[:, : len(joint)], effects[:, len(joint) :]
        sums = _sums(grid, singles[name].double(), alone, neurons, list(joint))
        both = torch.stack([sums, together], -1)  # [row, level, sum or joint]
        finite = finite_rows(both)
        per_set.append(group_means(both[finite], ablation.paragraphs.groups[pilot[name]][finite]))
    if not all(len(means) for means in per_set):
        return {}
    mean = per_set[0].mean(0) - per_set[1].mean(0)
    draws = [bootstrap_means(means, _DRAWS, generator) for means in per_set]
    resampled = (draws[0] - draws[1]).double()
    whole = list(joint).index("all")
    share = mean[:, 0] / mean[whole, 0]
    low, high = interval(resampled[:, :, 0] / resampled[:, [whole], 0])
    if min(map(len, per_set)) < 2:
        low, high = torch.full_like(low, torch.nan), torch.full_like(high, torch.nan)
    columns = torch.stack([*mean.unbind(-1), share, low, high], -1).float()
    return dict(zip(joint, columns, strict=True))


def levels_frame(levels: Mapping[str, Float[Tensor, " quantity"]]) -> pd.DataFrame:
    """One row per level: its quantities, and the interaction."""
    import pandas as pd

    rows = [
        {"level": level, **dict(zip(LEVEL_QUANTITIES, values.tolist(), strict=True))}
        for level, values in levels.items()
    ]
    frame = pd.DataFrame(rows, columns=["level", *LEVEL_QUANTITIES])
    frame.insert(3, "interaction", frame["joint"] - frame["sum"])
    return frame


def _sums(
    grid: ComponentGrid,
    singles: Float[Tensor, "row layer column"],
    unranked_mlps: Float[Tensor, "row mlp"],
    neurons: list[Component],
    levels: list[str],
) -> Float[Tensor, "row level"]:
    """The single effects of each level, added up."""
    heads = singles[:, :, grid.columns("head")].flatten(1).sum(1)
    mlps = singles[:, :, grid.columns("mlp")].flatten(1).sum(1) + unranked_mlps.sum(1)
    of_level = {"head": heads, "mlp": mlps, "all": heads + mlps}
    if neurons:
        places = [grid.place(neuron) for neuron in neurons]
        of_level["neuron"] = torch.stack([singles[:, i, j] for i, j in places]).sum(0)
    return torch.stack([of_level[level] for level in levels], 1)
