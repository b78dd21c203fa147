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

ALIKE = 1.5
"""Two joint effects are called alike if the larger is less than this multiple of the smaller."""

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
    score: Float[Tensor, "layer column"],
    on_controls: Float[Tensor, "layer column"],
) -> str:
    """The summary of a ranking.

    Args:
        grid: the components that were ranked.
        order: the components that its table lists, best first.
        significant: which are significant.
        counts: see `memcircuits.evidence.ranking.Ranking`.
        levels: likewise.
        score: the score of each component, nats/token.
        on_controls: how much removing it raises the loss of controls, nats/token.
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
    sentences += [*_outside_heads(levels), *_needed_by_all(grid, levels, score, on_controls)]
    return " ".join(sentences)


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
    more = _what_is_needed_more(of_heads_jointly, of_mlps_jointly)
    if not 0 <= share <= 1:  # one of the two costs controls more
        return [f"{text}.{more}"]
    between = "" if math.isnan(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return [f"{text}: {100 * share:.0f} %{between} of the sum lies outside heads.{more}"]


def _what_is_needed_more(heads: float, mlps: float) -> str:
    """One conclusion from the joint effects; none where one of them harms controls more."""
    if min(heads, mlps) <= 0:
        return ""
    if max(heads, mlps) < ALIKE * min(heads, mlps):
        return " Removed at once, either costs about as much: recitation needs both."
    return f" Removed at once, {'MLPs' if mlps > heads else 'heads'} cost more."


def _needed_by_all(
    grid: ComponentGrid,
    levels: Mapping[str, Float[Tensor, " quantity"]],
    score: Float[Tensor, "layer column"],
    on_controls: Float[Tensor, "layer column"],
) -> list[str]:
    """That one MLP which all text needs makes most of the sum outside heads, if it is so."""
    if "mlp" not in levels or "mlp" not in grid.units:
        return []
    of_mlps, of_heads = float(levels["mlp"][0]), float(levels["head"][0])
    column = grid.columns("mlp").start
    layer = int(score[:, column].argmax())
    largest, control = float(score[layer, column]), float(on_controls[layer, column])
    if largest < of_mlps / 2 or control < largest:
        return []
    name = grid.component(layer, column)
    return [
        f"{name} alone makes {largest:.2f} of the sum of MLPs, and all text needs it: without it "
        f"the loss of controls rises by {control:.2f} nats/token. The other MLPs make "
        f"{of_mlps - largest:.2f}, heads {of_heads:.2f}."
    ]
