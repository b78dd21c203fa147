"""How parts of a model are taken out: which activations are replaced, and where.

| component | activation | what is replaced |
| --- | --- | --- |
| head | z | the head's own |
| neuron | post | the neuron's own |
| MLP | mlp_out | all of it |
| layer | z, mlp_out | its heads' and its MLP's |

Several components are taken out at once by replacing the activations of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Int
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.errors import InputError
from memcircuits.evidence.activation_edits import RowsEdit
from memcircuits.models.hooks import hook_name


def replaced_parts(components: Sequence[Component], n_heads: int) -> dict[str, list[int]]:
    """Activation name -> the heads or neurons whose values are replaced; empty for all of it.

    Raises:
        InputError: for a component that is no head, neuron, MLP or layer.
    """
    parts: dict[str, list[int]] = {}
    for name, index in _places(components, n_heads):
        indices = parts.setdefault(name, [])
        if index is not None:
            indices.append(index)
    return {name: sorted(set(indices)) for name, indices in parts.items()}


def _places(components: Sequence[Component], n_heads: int) -> Iterator[tuple[str, int | None]]:
    """Names of activations, and the head or neuron that each component is within them."""
    for component in components:
        layer, unit = component.layer, component.unit
        if unit == "head":
            yield hook_name("z", layer), component.head
        elif unit == "neuron":
            yield hook_name("post", layer), component.neuron
        elif unit in ("mlp", "layer"):
            if unit == "layer":
                yield from ((hook_name("z", layer), head) for head in range(n_heads))
            yield hook_name("mlp_out", layer), None
        else:
            raise InputError("components", str(component), "give heads, MLPs, neurons and layers")


def edits_of(parts: Mapping[str, list[int]], new: Mapping[str, Tensor]) -> dict[str, RowsEdit]:
    """Activation name -> its edit.

    Args:
        parts: what is replaced, see `replaced_parts`.
        new: activation name -> its new values, [batch, pos, *rest]; sizes of 1 are broadcast.
    """
    return {name: _edit(name, indices, new[name]) for name, indices in parts.items()}


def _edit(name: str, indices: list[int], new: Tensor) -> RowsEdit:
    n_axes = 2 if name.endswith("hook_z") else 1  # behind batch and position

    def replace(activation: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        values = (new if len(new) == 1 else new[rows]).to(activation.dtype)
        if not indices:
            return values.expand_as(activation)
        # Some models hand their MLPs all positions in one axis.
        edited = activation.reshape(len(rows), -1, *activation.shape[-n_axes:]).clone()
        edited[:, :, indices] = values if values.shape[2] == 1 else values[:, :, indices]
        return edited.view(activation.shape)

    return replace
