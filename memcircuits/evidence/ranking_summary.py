"""A ranking as a table, and in two sentences: what is significant, what lies outside heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.components import Component, component_columns
from memcircuits.evidence.component_grid import ComponentGrid, RankedUnit

if TYPE_CHECKING:
    import pandas as pd

NOUNS: dict[RankedUnit, str] = {
    "head": "heads",
    "mlp": "MLPs",
    "layer": "layers",
    "neuron": "neurons",
}
"""What the components of a unit are called."""

FEW_PARAGRAPHS = 20
"""Fewer are hardly enough for any component to reach significance."""

NAMED = 5
"""Maximum number of components of a unit that the summary names."""


def table(
    components: Sequence[Component],
    places: Sequence[tuple[int, int]],
    numbers: Mapping[str, Float[Tensor, "layer column"]],
    *,
    neurons: bool,
) -> pd.DataFrame:
    """One row per component.

    Args:
        components: the components, best first.
        places: layer and column of each.
        numbers: column of the table -> its values.
        neurons: whether there is a column of neurons.
    """
    import pandas as pd

    rows, columns = torch.tensor(places).reshape(-1, 2).unbind(-1)
    data = component_columns(components)
    if not neurons:
        del data["neuron"]
    data["rank"] = range(1, len(places) + 1)
    data |= {name: values[rows, columns].numpy() for name, values in numbers.items()}
    return pd.DataFrame(data)


def summary(
    grid: ComponentGrid,
    order: Sequence[Component],
    significant: Bool[Tensor, "layer column"],
    counts: Mapping[str, int],
    levels: Mapping[str, Float[Tensor, " quantity"]],
) -> str:
    """The summary of a ranking.

    Args:
        grid: the components that were ranked.
        order: the components that its table lists, best first.
        significant: which are significant.
        counts: see `memcircuits.evidence.ranking.Ranking`.
        levels: likewise.
    """
    named = [component for component in order if significant[grid.place(component)]]
    sets = f"({_sets(counts)}, q < 0.05)"
    if not named:
        text = f"No {' or '.join(NOUNS[unit].removesuffix('s') for unit in grid.units)} is"
        sentences = [f"{text} significant {sets}."]
        if _groups(counts)[0] < FEW_PARAGRAPHS:
            sentences.append(
                "So few paragraphs can hardly reach that: read the order and intervals."
            )
    else:
        of_units = [
            f"{sum(c.unit == unit for c in named)} of {grid.n_layers * grid.size(unit)} "
            f"{NOUNS[unit]}"
            for unit in grid.units
        ]
        names = ", ".join(map(str, named[:NAMED]))
        if len(named) > NAMED:
            names += f" and {len(named) - NAMED} more"
        sentences = [f"{' and '.join(of_units)} are significant {sets}: {names}."]
    return " ".join([*sentences, *_outside_heads(levels)])


def _groups(counts: Mapping[str, int]) -> tuple[int, int]:
    """Independent groups; rankings of earlier versions took every paragraph as independent."""
    return (
        counts.get("groups", counts["measured"]),
        counts.get("groups_control", counts["measured_control"]),
    )


def _sets(counts: Mapping[str, int]) -> str:
    """What was compared."""
    measured, controls = counts["measured"], counts["measured_control"]
    n_controls = "as many" if controls == measured else str(controls)
    paragraphs = "1 memorized paragraph" if measured == 1 else f"{measured} memorized paragraphs"
    sets = f"{paragraphs} against {n_controls} controls"
    groups = _groups(counts)
    if groups != (measured, controls):
        sets += f", in {groups[0]} and {groups[1]} independent groups"
    return sets


def _outside_heads(levels: Mapping[str, Float[Tensor, " quantity"]]) -> list[str]:
    """How much of the effects lies in MLPs."""
    if "mlp" not in levels:
        return []
    of_heads, of_heads_jointly = levels["head"].tolist()[:2]
    of_mlps, of_mlps_jointly, share, low, high = levels["mlp"].tolist()
    text = (
        f"Removed one at a time, heads cost recitations {of_heads:.2f} nats/token more than "
        f"controls in sum, and MLPs {of_mlps:.2f} (all heads at once {of_heads_jointly:.2f}, all "
        f"MLPs {of_mlps_jointly:.2f})"
    )
    if not 0 <= share <= 1:  # one of the two costs controls more
        return [f"{text}."]
    between = "" if math.isnan(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return [
        f"{text}: {100 * share:.0f} %{between} of the sum lies outside heads. As sums and joint "
        "effects differ, this is not the one share of heads or MLPs."
    ]
