"""`ComponentGrid`: the components that are ranked, as columns of every layer.

Every layer has the same components, so one value for each of them is a grid [layer, column]: first
the heads, then the MLP, the layer itself, and the neurons, as far as these units are ranked. A grid
of heads alone is the usual [layer, head].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.errors import InputError, one_of, sequence
from memcircuits.models.adapter import Adapter

RankedUnit: TypeAlias = Literal["head", "mlp", "layer", "neuron"]
"""A sort of component that can be ranked."""

RANKED_UNITS: tuple[RankedUnit, ...] = get_args(RankedUnit)


class ComponentGrid(NamedTuple):
    """The components of some units.

    Attributes:
        units: the units, in the order of `RANKED_UNITS`.
        n_layers: number of layers.
        n_heads: heads of a layer.
        n_neurons: neurons of a layer.
    """

    units: tuple[RankedUnit, ...]
    n_layers: int
    n_heads: int
    n_neurons: int = 0

    @classmethod
    def of(cls, adapter: Adapter, units: Sequence[RankedUnit]) -> ComponentGrid:
        """The grid of a model; `units` are as `check_ranked_units` returns them."""
        n_neurons = 0
        if "neuron" in units:
            n_neurons = adapter.weight(0, "W_out").values.shape[1]
        return cls(tuple(units), adapter.n_layers, adapter.n_heads, n_neurons)

    def size(self, unit: RankedUnit) -> int:
        """Number of components of a unit in each layer."""
        if unit not in self.units:
            return 0
        return {"head": self.n_heads, "neuron": self.n_neurons}.get(unit, 1)

    @property
    def width(self) -> int:
        """Number of columns."""
        return sum(self.size(unit) for unit in self.units)

    def columns(self, unit: RankedUnit) -> slice:
        """The columns of a unit."""
        start = sum(self.size(u) for u in RANKED_UNITS[: RANKED_UNITS.index(unit)])
        return slice(start, start + self.size(unit))

    def place(self, component: Component) -> tuple[int, int]:
        """Layer and column of a component."""
        unit = next(unit for unit in self.units if unit == component.unit)
        offset = {"head": component.head, "neuron": component.neuron}.get(unit, 0)
        return component.layer, self.columns(unit).start + offset

    def component(self, layer: int, column: int) -> Component:
        """The component of a layer and column."""
        unit = next(u for u in self.units if column < self.columns(u).stop)
        offset = column - self.columns(unit).start
        return Component(
            unit,
            layer,
            head=offset if unit == "head" else -1,
            neuron=offset if unit == "neuron" else -1,
        )

    def components(self, unit: RankedUnit) -> list[Component]:
        """All components of a unit, layer by layer."""
        columns = range(*self.columns(unit).indices(self.width))
        return [self.component(layer, c) for layer in range(self.n_layers) for c in columns]

    def map_names(self) -> list[str]:
        """Names of the columns of a map, which leaves out the neurons."""
        heads = [str(head) for head in range(self.size("head"))]
        return heads + [unit for unit in self.units if unit in ("mlp", "layer")]

    def mask(self, components: Sequence[Component]) -> Bool[Tensor, "layer column"]:
        """Where the given components are."""
        mask = torch.zeros(self.n_layers, self.width, dtype=torch.bool)
        for component in components:
            mask[self.place(component)] = True
        return mask


def check_ranked_units(units: Any) -> tuple[RankedUnit, ...]:
    """The units that are asked for, in the order of `RANKED_UNITS`.

    Raises:
        InputError: for an unknown unit, or none.
    """
    sequence("units", units)
    for unit in units or ():
        one_of("units", unit, RANKED_UNITS)
    if not units:
        raise InputError("units", repr(units), "choose some of " + ", ".join(RANKED_UNITS))
    return tuple(unit for unit in RANKED_UNITS if unit in units)
