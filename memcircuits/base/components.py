"""`Component`: the name of a part of a model, such as a head, an MLP or a neuron.

| unit | name | part |
| --- | --- | --- |
| `head` | `L3H5` | an attention head |
| `qk`, `ov` | `L3H5.qk` | half of a head: what it attends to, what it writes |
| `attn`, `mlp` | `L3.mlp` | all heads of a layer, or its MLP |
| `neuron` | `L3N17` | one neuron of an MLP |
| `neurons` | `L3.neurons0` | a group of neurons of a layer |
| `layer` | `L3` | all heads and the MLP of a layer |
| `rest`, `all` | `rest` | what no layer holds (embeddings, norms), or everything |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head, HeadLike

Unit: TypeAlias = Literal[
    "head", "qk", "ov", "attn", "mlp", "neurons", "neuron", "layer", "rest", "all"
]
"""A sort of component."""

_NAME = re.compile(r"L(\d+)(?:H(\d+)|N(\d+)|(\.MLP))?")
_REMEDY = "write it like L3H5, L3.mlp, L3N17 or L3"


class Component(NamedTuple):
    """One part of a model; its text is its name.

    Attributes:
        unit: its sort.
        layer: index of the block; -1 for `rest` and `all`.
        head: index of the head; -1 where there is none.
        group: index of the group of neurons; -1 where there is none.
        neuron: index of the neuron; -1 where there is none.
    """

    unit: Unit
    layer: int = -1
    head: int = -1
    group: int = -1
    neuron: int = -1

    def __str__(self) -> str:
        if self.layer < 0:
            return self.unit
        if self.neuron >= 0:
            return f"L{self.layer}N{self.neuron}"
        if self.head >= 0:
            half = "" if self.unit == "head" else f".{self.unit}"
            return f"L{self.layer}H{self.head}{half}"
        if self.unit == "layer":
            return f"L{self.layer}"
        return f"L{self.layer}.{self.unit}" + (f"{self.group}" if self.group >= 0 else "")

    @classmethod
    def of(cls, value: Any) -> Component:
        """A head, MLP, neuron or layer by its name, or a head as a pair of layer and head.

        Raises:
            InputError: if it is none of these.

        Example:
            >>> Component.of("L3.mlp").unit, Component.of("L3N17").neuron
            ('mlp', 17)
        """
        if isinstance(value, Component):
            return value
        if not isinstance(value, str):
            head = Head.of(value)
            return cls("head", head.layer, head.head)
        name = _NAME.fullmatch(value.strip().upper())
        if name is None:
            raise InputError("component", repr(value), _REMEDY)
        layer, head_index, neuron, mlp = name.groups()
        if head_index is not None:
            return cls("head", int(layer), int(head_index))
        if neuron is not None:
            return cls("neuron", int(layer), neuron=int(neuron))
        return cls("mlp" if mlp else "layer", int(layer))


def component_columns(components: Sequence[Component]) -> dict[str, Any]:
    """Columns `unit, layer, head, neuron` of a table of components; empty where there is none."""
    return {
        "unit": [component.unit for component in components],
        "layer": [component.layer for component in components],
        "head": _indices([component.head for component in components]),
        "neuron": _indices([component.neuron for component in components]),
    }


def _indices(values: Sequence[int]) -> Any:
    """Plain integers where all components have an index, else missing where one has none."""
    import pandas as pd

    if min(values, default=0) >= 0:
        return list(values)
    return pd.array([None if value < 0 else value for value in values], dtype="Int64")


ComponentLike: TypeAlias = Component | HeadLike
"""A component as users write it: `"L3H5"`, `"L3.mlp"`, `"L3N17"`, `"L3"`, or a head's `Head`."""
