"""What can be transplanted: the parts of a model, down to a head's halves and groups of neurons.

The weight matrices of the blocks are divided three times, by layers, by heads and MLPs, and by
halves of heads and groups of neurons; together with `rest` each division covers all parameters:

| unit | name | weights |
| --- | --- | --- |
| `layer` | `L3` | all matrices of a block |
| `attn` | `L3.attn` | the matrices of all heads of a layer |
| `mlp` | `L3.mlp` | W_in, W_out, and W_gate where there is one |
| `head` | `L3H5` | a head's W_Q, W_K, W_V and W_O |
| `qk` | `L3H5.qk` | a head's W_Q and W_K: what it attends to |
| `ov` | `L3H5.ov` | a head's W_V and W_O: what it writes |
| `neurons` | `L3.neurons0` | a group of an MLP's neurons, those that differ most first |
| `rest` | `rest` | embeddings, unembedding, norms and biases |
| `all` | `all` | everything |

Neurons are grouped by how much their weights differ in the two models, so that group 0 of each
layer holds the neurons that training moved furthest apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.components import Component, Unit
from memcircuits.base.errors import InputError, at_least, one_of, sequence
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.exchange import (
    Patch,
    all_patches,
    check_exchangeable,
    exchanged,
    matrix_patches,
    remaining_patches,
)
from memcircuits.models.registry import adapt
from memcircuits.models.weights import HEAD_COMPONENTS

UNITS: tuple[Unit, ...] = ("head", "qk", "ov", "attn", "mlp", "neurons", "layer", "rest", "all")
"""What of a model can be transplanted."""

HEAD_MATRICES: dict[str, tuple[str, ...]] = {
    "head": HEAD_COMPONENTS,
    "qk": ("W_Q", "W_K"),
    "ov": ("W_V", "W_O"),
}
"""The matrices of the units that belong to one head."""

NEURON_GROUPS = 8
"""Default number of groups of neurons in each layer."""


def components_of(
    adapter: Adapter, units: Sequence[Unit], neuron_groups: int = NEURON_GROUPS
) -> list[Component]:
    """All components of some units: layer by layer, then `rest` and `all`."""
    n_groups = min(neuron_groups, adapter.weight(0, "W_out").values.shape[1])
    components: list[Component] = []
    for layer in range(adapter.n_layers):
        for unit in units:
            if unit in HEAD_MATRICES:
                components += [Component(unit, layer, head) for head in range(adapter.n_heads)]
            elif unit == "neurons":
                components += [Component(unit, layer, group=group) for group in range(n_groups)]
            elif unit in ("attn", "mlp", "layer"):
                components.append(Component(unit, layer))
    return components + [Component(unit) for unit in units if unit in ("rest", "all")]


def check_units(units: Any, allowed: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units that are asked for, in the order of `allowed`; all of these for None.

    Raises:
        InputError: for an unknown unit, or none.
    """
    if units is None:
        return tuple(allowed)
    sequence("units", units)
    for unit in units:
        one_of("units", unit, allowed)
    if not units:
        raise InputError("units", "empty", "choose some of " + ", ".join(allowed))
    return tuple(unit for unit in allowed if unit in units)


class NeuronOrder:
    """The groups of neurons of two models.

    Args:
        adapter: the model.
        other: a model of the same shape.
        n_groups: number of groups in each layer.
    """

    def __init__(self, adapter: Adapter, other: Adapter, n_groups: int) -> None:
        at_least("neuron_groups", n_groups, 1)
        self._adapters = adapter, other
        self._n_groups = n_groups
        self._of_layer: dict[int, tuple[Tensor, ...]] = {}

    def group(self, layer: int, index: int) -> Int[Tensor, " neuron"]:
        """The neurons of a group, those whose weights differ most first."""
        if layer not in self._of_layer:
            adapter, other = self._adapters
            size = torch.zeros(())
            for name in _mlp_matrices(adapter):
                ours, theirs = (a.weight(layer, name).values[0] for a in (adapter, other))
                change = (ours - theirs.to(ours.device)).double().square().cpu()
                size = size + change.sum(1 if name == "W_out" else 0)
            order = size.argsort(descending=True, stable=True)
            self._of_layer[layer] = torch.tensor_split(order, min(self._n_groups, len(order)))
        return self._of_layer[layer][index]


def _mlp_matrices(adapter: Adapter) -> tuple[str, ...]:
    return tuple(name for name in adapter.components if name not in HEAD_COMPONENTS)


def patches_of(
    adapter: Adapter, other: Adapter, component: Component, neurons: NeuronOrder
) -> list[Patch]:
    """The weights of a component, to be taken from the other model.

    Where heads share keys and values, a head's W_K and W_V are those of its group.
    """
    layer, unit = component.layer, component.unit
    if unit == "all":
        return all_patches(adapter, other)
    if unit == "rest":
        return remaining_patches(adapter, other)
    if unit in HEAD_MATRICES:
        shared = adapter.n_heads // adapter.n_kv_heads
        return [
            patch
            for name in HEAD_MATRICES[unit]
            for patch in matrix_patches(
                adapter,
                other,
                layer,
                [name],
                component.head // shared if name in ("W_K", "W_V") else component.head,
            )
        ]
    if unit == "neurons":
        chosen = neurons.group(layer, component.group).to(adapter.device)
        return [
            patch
            for name in _mlp_matrices(adapter)
            for patch in matrix_patches(
                adapter, other, layer, [name], (0, chosen) if name == "W_out" else (0, ..., chosen)
            )
        ]
    matrices = {
        "attn": HEAD_COMPONENTS,
        "mlp": _mlp_matrices(adapter),
        "layer": adapter.components,
    }
    return matrix_patches(adapter, other, layer, matrices[unit])


@contextlib.contextmanager
def transplanted(
    model: Model, twin: Model, names: Sequence[str], *, neuron_groups: int = NEURON_GROUPS
) -> Iterator[Model]:
    """Inside, the model holds the twin's weights of some components; afterwards it is as it was.

    Args:
        model: the model.
        twin: a model of the same class, basis and shape.
        names: components as in the table above, such as `L3H5`, `L3H5.ov`, `L3.mlp` or `rest`.
        neuron_groups: number of groups of neurons in each layer.

    Raises:
        InputError: for a component that does not exist, or models of different shapes.
    """
    adapter, other = adapt(model), adapt(twin)
    sequence("names", names)
    check_exchangeable("twin", adapter, other)
    neurons = NeuronOrder(adapter, other, neuron_groups)
    known = {str(part): part for part in components_of(adapter, UNITS, neuron_groups)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError("names", repr(unknown[0]), "write it like L3H5, L3H5.ov, L3.mlp or rest")
    patches = [p for name in names for p in patches_of(adapter, other, known[name], neurons)]
    with exchanged(patches):
        yield model
