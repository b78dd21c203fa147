"""Weights of one model in another of the same architecture, for as long as an analysis runs.

Two models whose parameters have the same names, shapes and types can hold each other's weights, all
of them or some: a whole matrix, a head's slice of it, some columns. `Patch` says which weights,
`exchanged` writes and restores them, `check_exchangeable` tries whether all of one model's weights
make the other model out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.models.adapter import Adapter

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats; of half precision 0.25


class Patch(NamedTuple):
    """Some weights of one model, and the values to write there.

    Attributes:
        target: a view of a parameter.
        source: a tensor of the same shape.
        index: which entries are written; by default, all.
    """

    target: Tensor
    source: Tensor
    index: Any = ...

    @property
    def changes(self) -> bool:
        """Whether any weight would get another value."""
        return not torch.equal(
            self.target[self.index], self.source[self.index].to(self.target.device)
        )


@contextlib.contextmanager
def exchanged(patches: Sequence[Patch]) -> Iterator[None]:
    """Inside, the targets hold the values of the sources; afterwards they are as before."""
    originals: list[Tensor] = []
    try:
        with torch.no_grad():
            for patch in patches:
                originals.append(patch.target[patch.index].clone())
                patch.target[patch.index] = patch.source[patch.index].to(patch.target.device)
        yield
    finally:
        with torch.no_grad():
            # In reverse: of weights that were written twice the first original is the true one.
            for patch, original in reversed(list(zip(patches, originals, strict=False))):
                patch.target[patch.index] = original


def matrix_patches(
    adapter: Adapter, other: Adapter, layer: int, components: Sequence[str], index: Any = ...
) -> list[Patch]:
    """The other model's weight matrices of a layer, or an index into their [head, d_in, d_out]."""
    return [
        Patch(adapter.weight(layer, name).values, other.weight(layer, name).values, index)
        for name in components
    ]


def remaining_patches(adapter: Adapter, other: Adapter) -> list[Patch]:
    """All parameters that are no weight matrix of a block: embeddings, norms, biases."""
    matrices = {weight.parameter.data_ptr() for weight in adapter.weights()}
    theirs = _tensors(other)
    return [
        Patch(tensor, theirs[name])
        for name, tensor in _tensors(adapter).items()
        if tensor.data_ptr() not in matrices
    ]


def all_patches(adapter: Adapter, other: Adapter) -> list[Patch]:
    """All parameters."""
    matrices = [
        patch
        for layer in range(adapter.n_layers)
        for patch in matrix_patches(adapter, other, layer, adapter.components)
    ]
    return [*matrices, *remaining_patches(adapter, other)]


def check_exchangeable(argument: str, adapter: Adapter, other: Adapter) -> None:
    """Raise `InputError` unless the model with all weights of `other` computes what `other` does.

    Args:
        argument: name of the argument that `other` came in, for the error.
        adapter: the model.
        other: the other model.
    """
    ours, theirs = (_layout(a) for a in (adapter, other))
    different = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if different or (adapter.kind, adapter.basis) != (other.kind, other.basis):
        reason = f"differs in {different[0]}" if different else f"is a {other.kind} ({other.basis})"
        raise InputError(
            argument,
            f"{other.label} {reason}",
            "give a model of the same class, basis and shape, whose weights the model can hold",
        )
    probe = torch.arange(8)[None] % adapter.d_vocab
    with other.preserving_state():
        expected = other.forward(probe).float().log_softmax(-1)
    with adapter.preserving_state(), exchanged(all_patches(adapter, other)):
        held = adapter.forward(probe).float().log_softmax(-1)
    off = float((held - expected.to(held)).abs().nan_to_num(0.0).max())
    if off > _TOLERANCE.get(adapter.dtype, 0.25):
        raise InputError(
            argument,
            f"{other.label}: with all of its weights the model is off by {off:.2g} nats",
            "give a model of the same configuration",
        )


def _layout(adapter: Adapter) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in _tensors(adapter).items()}


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What a model stores: its parameters, and buffers such as the bias of a folded norm."""
    return {name: tensor.detach() for name, tensor in adapter.model.state_dict().items()}
