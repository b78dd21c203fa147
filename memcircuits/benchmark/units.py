"""What localizers score: heads, blocks, components, neurons or weights of a model.

`LocalizationTask` is the input of every localizer, `truth_of` the correct answer, `pool_scores`
the way from scores of single weights to scores of units, and `count_forwards` the common measure of
cost. Scores are flat: heads by layer and head, blocks by layer (attention, then MLP), components as
all heads and then the MLP of each layer, neurons by layer, weights matrix by matrix in the order of
`Adapter.weights`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.editing.planting import Planted
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.models.weights import HEAD_COMPONENTS

Unit = Literal["head", "block", "component", "neuron", "weight"]
"""The parts of a model that are scored; a block is a layer's attention or its MLP, a component is a
head or the MLP of a layer."""

UNITS: tuple[Unit, ...] = get_args(Unit)

Pooling = Literal["max", "mean", "l2", "sum"]
"""How the scores of a unit's weights become one score."""


@dataclass(frozen=True)
class LocalizationTask:
    """What a localizer is given.

    Attributes:
        model: the model that recites the targets.
        targets: the paragraphs to localize.
        control: other paragraphs, at least two.
        unigrams: token counts, for `rare-token-attention`.
        seed: seed of all random draws.
        planted: the truth; only `oracle` reads it.
        reference: a third set, whose activations replace those of targets and controls in mean and
            resample ablation; only these read it.
    """

    model: Model
    targets: Paragraphs
    control: Paragraphs
    unigrams: UnigramTable | None = None
    seed: int = 0
    planted: Planted | None = None
    reference: Paragraphs | None = None

    @cached_property
    def adapter(self) -> Adapter:
        """The model's adapter."""
        return adapt(self.model)

    @property
    def generator(self) -> torch.Generator:
        """A new generator at the task's seed."""
        return torch.Generator().manual_seed(self.seed)


def scatter_planted(
    adapter: Adapter, planted: Planted, values: Mapping[str, Tensor]
) -> list[Float[Tensor, "head d_in d_out"]]:
    """Values of the planted weights in their matrices, 0 at all other weights.

    Args:
        adapter: the model.
        planted: what was planted.
        values: matrix (`3.W_V`) -> one value for each of `planted.indices`.

    Returns:
        One tensor for each of `Adapter.weights`.
    """
    matrices = []
    for weight in adapter.weights():
        matrix = torch.zeros(weight.values.numel())
        name = f"{weight.layer}.{weight.component}"
        if name in planted.indices:
            matrix[planted.indices[name]] = values[name].float()
        matrices.append(matrix.view(weight.values.shape))
    return matrices


def truth_of(adapter: Adapter, planted: Planted, unit: Unit) -> Bool[Tensor, " unit"]:
    """Which units hold a planted weight, in the order of `localize`."""
    ones = {name: torch.ones(len(indices)) for name, indices in planted.indices.items()}
    is_written = scatter_planted(adapter, planted, ones)
    if unit in ("head", "component") and planted.truth.heads:
        # Heads that share keys and values with a planted head have planted weights, too, but
        # the text was to be held by the named heads.
        is_planted = pool_scores(adapter, is_written, unit, "max") > 0
        is_planted[: adapter.n_layers * adapter.n_heads] = False
        for head in planted.truth.heads:
            is_planted[head.layer * adapter.n_heads + head.head] = True
        return is_planted
    if unit == "neuron":
        # All weights of a planted neuron in the written matrices are written; planting in random
        # weights writes single weights of most neurons.
        of_neurons = [c for c in adapter.components if c not in HEAD_COMPONENTS]
        written = {name.partition(".")[2] for name in planted.indices} & {*of_neurons}
        share = pool_scores(adapter, is_written, unit, "mean") * len(of_neurons)
        return share > 0.99 * max(1, len(written))
    return pool_scores(adapter, is_written, unit, "max") > 0


def pool_scores(
    adapter: Adapter,
    scores: Sequence[Float[Tensor, "head d_in d_out"]],
    unit: Unit,
    pooling: Pooling,
) -> Float[Tensor, " unit"]:
    """Pool the absolute scores of single weights over all weights of each unit.

    Args:
        adapter: the model.
        scores: one tensor for each of `Adapter.weights`, as `Weight.split` views it.
        unit: see `localize`.
        pooling: applied to all of the unit's weights together.
    """
    if unit == "weight":
        return torch.cat([matrix.abs().flatten().cpu() for matrix in scores])
    by_layer: dict[int, list[tuple[str, Tensor]]] = {i: [] for i in range(adapter.n_layers)}
    for weight, matrix in zip(adapter.weights(), scores, strict=True):
        by_layer[weight.layer].append((weight.component, matrix.abs().float().cpu()))
    pooled, pooled_mlps = [], []
    for matrices in by_layer.values():
        # Keys and values of grouped-query models count for every head of their group.
        attention = [
            matrix.repeat_interleave(adapter.n_heads // len(matrix), 0).flatten(1)
            for component, matrix in matrices
            if component in HEAD_COMPONENTS
        ]
        mlp = [  # [neuron, d_model]
            matrix[0] if component == "W_out" else matrix[0].T
            for component, matrix in matrices
            if component not in HEAD_COMPONENTS
        ]
        if unit in ("head", "component"):
            pooled.append(_pool(torch.cat(attention, 1), pooling))
            if unit == "component":
                pooled_mlps.append(_pool(torch.cat(mlp, 1).flatten()[None], pooling))
        elif unit == "neuron":
            pooled.append(_pool(torch.cat(mlp, 1), pooling))
        else:
            for block in (attention, mlp):
                weights = torch.cat([matrix.flatten() for matrix in block])
                pooled.append(_pool(weights[None], pooling))
    return torch.cat(pooled + pooled_mlps)


def _pool(scores: Float[Tensor, "unit weight"], pooling: Pooling) -> Float[Tensor, " unit"]:
    if pooling == "l2":
        return scores.square().sum(-1).sqrt()
    if pooling == "max":
        return scores.amax(-1)
    return scores.sum(-1) if pooling == "sum" else scores.mean(-1)


@contextlib.contextmanager
def count_forwards(adapter: Adapter) -> Iterator[dict[str, float]]:
    """Count the work done inside, in forward passes of one paragraph.

    Running one block on one row of a batch is 1 / n_layers of a forward pass. With gradients
    enabled it counts three times, for the backward pass that follows (which costs about two
    forward passes).

    Yields:
        A dictionary whose `forwards` grows with the work.
    """
    cost = {"forwards": 0.0}

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        passes = 3 if torch.is_grad_enabled() else 1
        cost["forwards"] += 1 / adapter.n_layers * hidden.shape[0] * passes

    handles = [b.register_forward_pre_hook(count, with_kwargs=True) for b in adapter.model.blocks]
    try:
        yield cost
    finally:
        for handle in handles:
            handle.remove()
