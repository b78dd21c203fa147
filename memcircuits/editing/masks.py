"""Masks of single weights: choosing, reading, writing and restoring them exactly.

A weight is identified by its layer, its component and its position in `[head, d_in, d_out]`. These
are the same in every architecture (see `memcircuits.models.weights`), so a saved mask selects the
same weights in another copy of the model. A mask holds the candidates with the largest scores; a
random mask is that of random scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memcircuits.base.errors import InputError, one_of, sequence
from memcircuits.base.errors import fraction as check_fraction
from memcircuits.base.heads import Head, HeadLike
from memcircuits.models.adapter import Adapter
from memcircuits.models.state import refuse_inference_tensors
from memcircuits.models.weights import HEAD_COMPONENTS, Weight

MaskStrategy = Literal["top", "top-per-component", "random", "random-per-tensor", "all"]
"""How a mask is chosen, see `Candidates.choose`."""

MASK_STRATEGIES: tuple[MaskStrategy, ...] = get_args(MaskStrategy)


@dataclass(frozen=True)
class Mask:
    """Some of the weights of a model.

    Attributes:
        weights: the matrices that hold them.
        indices: for each matrix the positions in the flattened `[head, d_in, d_out]`, ascending.
        n_candidates: number of weights that the mask was chosen from.
    """

    weights: tuple[Weight, ...]
    indices: tuple[Int[Tensor, " weight"], ...]
    n_candidates: int

    def __len__(self) -> int:
        return sum(len(i) for i in self.indices)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the weights, in order."""
        return [weight.parameter for weight in self.weights]

    @property
    def device(self) -> torch.device:
        """The device of the first matrix; `gather` collects there."""
        return self.weights[0].parameter.device

    @property
    def named(self) -> dict[str, Weight]:
        """The matrices by name, like `3.W_in`."""
        return {f"{weight.layer}.{weight.component}": weight for weight in self.weights}

    @cached_property
    def _positions(self) -> list[tuple[Tensor, ...] | EllipsisType]:
        """What selects the masked weights in `[head, d_in, d_out]`; a whole matrix needs no index.

        Most of the time of a step on all weights would go into indexing.
        """
        positions: list[tuple[Tensor, ...] | EllipsisType] = []
        for weight, index in zip(self.weights, self.indices, strict=True):
            shape = weight.values.shape
            is_whole = torch.equal(index.cpu(), torch.arange(weight.values.numel()))
            on_device = index.to(weight.parameter.device)
            positions.append(... if is_whole else torch.unravel_index(on_device, shape))
        return positions

    def select(
        self, matrices: Sequence[Float[Tensor, "head d_in d_out"]]
    ) -> Float[Tensor, " weight"]:
        """The masked entries of one tensor per matrix, as float32 on one device."""
        parts = [
            matrix[position].flatten().float().to(self.device)
            for matrix, position in zip(matrices, self._positions, strict=True)
        ]
        return torch.cat(parts)

    def spread(self, values: Float[Tensor, " weight"]) -> list[Float[Tensor, "head d_in d_out"]]:
        """One tensor per matrix with these values in the masked entries, and 0 elsewhere."""
        matrices = []
        parts = values.split([len(i) for i in self.indices])
        for weight, position, part in zip(self.weights, self._positions, parts, strict=True):
            matrix = part.new_zeros(weight.values.shape, device=weight.parameter.device)
            matrix[position] = _shaped(part, matrix, position)
            matrices.append(matrix)
        return matrices

    def gather(self, tensors: Sequence[Tensor]) -> Float[Tensor, " weight"]:
        """The masked entries of tensors of the parameters' shapes, as float32 on one device."""
        return self.select(
            [w.split(tensor.detach()) for w, tensor in zip(self.weights, tensors, strict=True)]
        )

    def read(self) -> list[Tensor]:
        """The masked weights of each matrix: copies, in the matrix's own dtype."""
        return [
            w.values[position].flatten().clone()
            for w, position in zip(self.weights, self._positions, strict=True)
        ]

    def write(self, values: Sequence[Tensor]) -> None:
        """Overwrite the masked weights, and nothing else."""
        for weight, position, new in zip(self.weights, self._positions, values, strict=True):
            weight.values[position] = _shaped(new, weight.values, position)

    def add(self, original: Sequence[Tensor], delta: Float[Tensor, " weight"]) -> None:
        """Set the masked weights to `original + delta`, summed in float64 and rounded once."""
        parts = delta.detach().split([len(i) for i in self.indices])
        self.write(
            [
                (old.double() + part.to(old.device).double()).to(old.dtype)
                for old, part in zip(original, parts, strict=True)
            ]
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[list[Tensor]]:
        """Restore the masked weights bit for bit on leaving, also after an exception or Ctrl-C."""
        original = self.read()
        try:
            yield original
        finally:
            self.write(original)

    def root_mean_squares(self) -> Float[Tensor, " weight"]:
        """For each masked weight the root mean square of its matrix."""
        return torch.cat(
            [
                weight.matrix.float().square().mean().sqrt().expand(len(index)).to(self.device)
                for weight, index in zip(self.weights, self.indices, strict=True)
            ]
        )

    def by_matrix(self, values: Tensor) -> dict[str, Tensor]:
        """Split one value per masked weight by matrix."""
        parts = values.split([len(i) for i in self.indices])
        return dict(zip(self.named, parts, strict=True))


def _shaped(values: Tensor, matrix: Tensor, position: tuple[Tensor, ...] | EllipsisType) -> Tensor:
    """One value per selected weight, in the shape in which `position` selects them."""
    return values.view(matrix.shape) if position is ... else values


def named_mask(adapter: Adapter, indices: Mapping[str, Tensor], n_candidates: int) -> Mask:
    """The mask of saved indices in a model.

    Raises:
        InputError: if the model has no such weights.
        UnsupportedModel: if they were made inside `torch.inference_mode()`.
    """
    weights = []
    for name, index in indices.items():
        layer, _, component = name.partition(".")
        if not layer.isdigit() or int(layer) >= adapter.n_layers:
            raise InputError("indices", repr(name), f"{adapter.name} has no such weight matrix")
        one_of("component", component, adapter.components)
        weight = adapter.weight(int(layer), component)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < weight.values.numel():
            raise InputError("indices", int(index.max()), f"{name} of {adapter.name} is smaller")
        weights.append(weight)
    refuse_inference_tensors(adapter.model, [weight.parameter for weight in weights])
    return Mask(tuple(weights), tuple(indices.values()), n_candidates)


@dataclass(frozen=True)
class Candidates:
    """The weights that a mask may be chosen from.

    Attributes:
        weights: the matrices.
        heads: for each matrix which heads (the first axis of `[head, d_in, d_out]`) are allowed.
    """

    weights: tuple[Weight, ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        *,
        heads: Sequence[HeadLike] | None = None,
        layers: Sequence[int] | None = None,
        components: Sequence[str] | None = None,
    ) -> Candidates:
        """All matrices of the blocks, or only those asked for.

        Args:
            adapter: the model.
            heads: only these heads' W_Q, W_K, W_V and W_O (grouped-query: the key-value head that
                the head reads), no MLP.
            layers: only these layers.
            components: only these, such as `W_in`.

        Raises:
            InputError: if something asked for does not exist, or no weight remains.
            UnsupportedModel: if the weights were made inside `torch.inference_mode()`.
        """
        for name, value in {"heads": heads, "layers": layers, "components": components}.items():
            sequence(name, value)
        for component in components or ():
            one_of("components", component, adapter.components)
        for layer in layers or ():
            if not isinstance(layer, int) or not 0 <= layer < adapter.n_layers:
                raise InputError("layers", layer, f"layers go from 0 to {adapter.n_layers - 1}")
        allowed_heads = None if heads is None else [adapter.check_head(head) for head in heads]
        allowed_layers = range(adapter.n_layers) if layers is None else sorted(set(layers))
        weights, head_indices = [], []
        for layer in allowed_layers:
            for component in adapter.components:
                if components is not None and component not in components:
                    continue
                weight = adapter.weight(layer, component)
                indices = _allowed_indices(adapter, weight, allowed_heads)
                if indices:
                    weights.append(weight)
                    head_indices.append(indices)
        if not weights:
            raise InputError(
                "heads, layers, components",
                "no weight is left",
                "the mask needs at least one; widen the choice",
            )
        refuse_inference_tensors(adapter.model, [weight.parameter for weight in weights])
        return cls(tuple(weights), tuple(head_indices))

    def __len__(self) -> int:
        return sum(self._sizes())

    def choose(
        self,
        fraction: float,
        scores: Sequence[Tensor] | None,
        strategy: MaskStrategy = "top",
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Choose a fraction of the candidates.

        Args:
            fraction: of the candidates, in (0, 1]; at least one weight is chosen.
            scores: for each matrix a tensor of its parameter's shape; not needed for `random` and
                `all`.
            strategy: `top` (largest |score|), `top-per-component` (from each component, over all
                its layers, the same fraction by |score|), `random` (all equally likely),
                `random-per-tensor` (from each matrix as many as `top` would choose) or `all`.
            generator: of the random choices.
        """
        check_fraction("fraction", fraction)
        one_of("mask", strategy, MASK_STRATEGIES)
        n = max(1, round(fraction * len(self)))
        heads = [torch.tensor(indices) for indices in self.heads]
        if strategy == "all":
            return self._mask([torch.arange(size) for size in self._sizes()])
        if strategy == "random":
            return self._mask(_largest(self._noise(generator), n))
        assert scores is not None
        candidate_scores = [
            weight.split(score)[indices.to(score.device)].flatten().abs()
            for weight, score, indices in zip(self.weights, scores, heads, strict=True)
        ]
        if strategy == "top-per-component":
            return self._mask(self._largest_per_component(candidate_scores, fraction))
        chosen = _largest(candidate_scores, n)
        if strategy == "random-per-tensor":
            chosen = [
                noise.topk(len(top)).indices
                for noise, top in zip(self._noise(generator), chosen, strict=True)
            ]
        return self._mask(chosen)

    def _largest_per_component(
        self, scores: Sequence[Tensor], fraction: float
    ) -> list[Int[Tensor, " weight"]]:
        """For each matrix the positions among the largest of all matrices of its component."""
        chosen: dict[int, Tensor] = {}
        for component in dict.fromkeys(weight.component for weight in self.weights):
            places = [i for i, w in enumerate(self.weights) if w.component == component]
            own = [scores[i] for i in places]
            n = max(1, round(fraction * sum(len(score) for score in own)))
            chosen |= dict(zip(places, _largest(own, n), strict=True))
        return [chosen[i] for i in range(len(self.weights))]

    def _sizes(self) -> list[int]:
        """Candidates of each matrix."""
        return [len(h) * w.values[0].numel() for h, w in zip(self.heads, self.weights, strict=True)]

    def _noise(self, generator: torch.Generator | None) -> list[Tensor]:
        return [torch.rand(size, generator=generator) for size in self._sizes()]

    def _mask(self, chosen: Sequence[Tensor]) -> Mask:
        """From positions among the allowed heads to positions in the whole matrix."""
        weights, indices = [], []
        for weight, heads, index in zip(self.weights, self.heads, chosen, strict=True):
            if not len(index):
                continue
            size = weight.values[0].numel()
            index = index.cpu()
            weights.append(weight)
            indices.append((torch.tensor(heads)[index // size] * size + index % size).sort().values)
        return Mask(tuple(weights), tuple(indices), len(self))


def _allowed_indices(
    adapter: Adapter, weight: Weight, allowed: Sequence[Head] | None
) -> tuple[int, ...]:
    """Indices in a matrix's head axis that the allowed heads use; all if `allowed` is None."""
    indices = range(weight.values.shape[0])
    if allowed is None:
        return tuple(indices)
    if weight.component not in HEAD_COMPONENTS:
        return ()
    # Under grouped-query attention several heads share one key-value head.
    heads_per_index = 1
    if weight.component in ("W_K", "W_V"):
        heads_per_index = adapter.n_heads // adapter.n_kv_heads
    used = {head.head // heads_per_index for head in allowed if head.layer == weight.layer}
    return tuple(index for index in indices if index in used)


def _largest(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """For each tensor the positions of its entries that are among the `n` largest of all."""
    best = [score.topk(min(n, len(score))) for score in scores]
    values = torch.cat([b.values.float().cpu() for b in best])
    chosen = values.topk(min(n, len(values))).indices
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[chosen] = True
    parts = keep.split([len(b.values) for b in best])
    return [b.indices.cpu()[part] for b, part in zip(best, parts, strict=True)]
