"""Sets of single weights: which ones, their values, and writing them so that they can be put back.

A weight is named by layer, component and its place in `[head, d_in, d_out]`, the same in every
architecture (see `memcircuits.models.adapter`), so a mask can be saved and found again in another copy of
the model. Scores decide a mask; a random mask is that of random scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memcircuits.core.errors import InputError, fraction, one_of, sequence
from memcircuits.core.heads import Head
from memcircuits.models.adapter import Adapter
from memcircuits.models.weights import HEAD_COMPONENTS, Weight

CHOICES = ("top", "random", "random-per-tensor", "all")


@dataclass(frozen=True)
class Mask:
    """Some of the weights of a model.

    Attributes:
        weights: the matrices that hold them.
        indices: for each matrix the places in the flattened `[head, d_in, d_out]`, ascending.
        n_candidates: how many weights they were chosen from.
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
    def named(self) -> dict[str, Weight]:
        """The matrices by name, like `3.W_in`."""
        return {f"{weight.layer}.{weight.component}": weight for weight in self.weights}

    @cached_property
    def _places(self) -> list[tuple[Tensor, ...]]:
        return [
            torch.unravel_index(index.to(weight.parameter.device), weight.values.shape)
            for weight, index in zip(self.weights, self.indices, strict=True)
        ]

    def gather(self, tensors: Sequence[Tensor]) -> Float[Tensor, " weight"]:
        """The masked entries of tensors of the parameters' shapes, as float32 on one device."""
        device = self.weights[0].parameter.device
        parts = [
            weight.split(tensor.detach())[place].float().to(device)
            for weight, tensor, place in zip(self.weights, tensors, self._places, strict=True)
        ]
        return torch.cat(parts)

    def read(self) -> list[Tensor]:
        """The masked weights of each matrix, copied, in their own type."""
        return [w.values[place] for w, place in zip(self.weights, self._places, strict=True)]

    def write(self, values: Sequence[Tensor]) -> None:
        """Overwrite the masked weights, and nothing else."""
        for weight, place, new in zip(self.weights, self._places, values, strict=True):
            weight.values[place] = new

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
        """Put the masked weights back bit by bit on leaving, also after an exception or Ctrl-C."""
        original = self.read()
        try:
            yield original
        finally:
            self.write(original)

    def by_matrix(self, values: Tensor) -> dict[str, Tensor]:
        """Split one value per masked weight by matrix."""
        parts = values.split([len(i) for i in self.indices])
        return dict(zip(self.named, parts, strict=True))


def named_mask(adapter: Adapter, indices: Mapping[str, Tensor], n_candidates: int) -> Mask:
    """The mask of saved indices in a model.

    Raises:
        InputError: if the model has no such weights.
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
        heads: Sequence[Head | str] | None = None,
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
            InputError: if something asked for does not exist, or nothing is left.
        """
        for name, value in {"heads": heads, "layers": layers, "components": components}.items():
            sequence(name, value)
        for component in components or ():
            one_of("components", component, adapter.components)
        for layer in layers or ():
            if not isinstance(layer, int) or not 0 <= layer < adapter.n_layers:
                raise InputError("layers", layer, f"layers go from 0 to {adapter.n_layers - 1}")
        wanted = None if heads is None else [adapter.check_head(head) for head in heads]
        shared = adapter.n_heads // adapter.n_kv_heads
        weights, allowed = [], []
        for layer in range(adapter.n_layers) if layers is None else sorted(set(layers)):
            for component in adapter.components:
                if components is not None and component not in components:
                    continue
                weight = adapter.weight(layer, component)
                rows = range(weight.values.shape[0])
                if wanted is not None:
                    if component not in HEAD_COMPONENTS:
                        continue
                    step = shared if component in ("W_K", "W_V") else 1
                    mine = {head.head // step for head in wanted if head.layer == layer}
                    rows = [row for row in rows if row in mine]  # type: ignore[assignment]
                if len(rows):
                    weights.append(weight)
                    allowed.append(tuple(rows))
        if not weights:
            raise InputError(
                "heads, layers, components",
                "no weight is left",
                "the mask needs at least one; widen the choice",
            )
        return cls(tuple(weights), tuple(allowed))

    def __len__(self) -> int:
        return sum(
            len(heads) * weight.values[0].numel()
            for weight, heads in zip(self.weights, self.heads, strict=True)
        )

    def choose(
        self,
        part: float,
        scores: Sequence[Tensor] | None,
        how: str = "top",
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Choose a fraction of the candidates.

        Args:
            part: how much of the candidates, in (0, 1]; at least one weight is chosen.
            scores: for each matrix a tensor of its parameter's shape; not needed for `random` and
                `all`.
            how: `top` (largest |score|), `random` (all candidates alike), `random-per-tensor` (from
                each matrix as many as `top` would choose) or `all`.
            generator: of the random choices.
        """
        fraction("fraction", part)
        one_of("mask", how, CHOICES)
        n = max(1, round(part * len(self)))
        rows = [torch.tensor(h) for h in self.heads]
        if how == "all":
            counts = [len(r) * w.values[0].numel() for r, w in zip(rows, self.weights, strict=True)]
            return self._mask([torch.arange(count) for count in counts])
        if how == "random":
            return self._mask(_largest(self._noise(generator), n))
        assert scores is not None
        flat = [
            weight.split(score)[row.to(score.device)].flatten().abs()
            for weight, score, row in zip(self.weights, scores, rows, strict=True)
        ]
        chosen = _largest(flat, n)
        if how == "random-per-tensor":
            chosen = [
                noise.topk(len(mine)).indices
                for noise, mine in zip(self._noise(generator), chosen, strict=True)
            ]
        return self._mask(chosen)

    def _noise(self, generator: torch.Generator | None) -> list[Tensor]:
        return [
            torch.rand(len(heads) * weight.values[0].numel(), generator=generator)
            for weight, heads in zip(self.weights, self.heads, strict=True)
        ]

    def _mask(self, chosen: Sequence[Tensor]) -> Mask:
        """From places among the allowed heads to places in the whole matrix."""
        weights, indices = [], []
        for weight, heads, index in zip(self.weights, self.heads, chosen, strict=True):
            if not len(index):
                continue
            size = weight.values[0].numel()
            index = index.cpu()
            weights.append(weight)
            indices.append((torch.tensor(heads)[index // size] * size + index % size).sort().values)
        return Mask(tuple(weights), tuple(indices), len(self))


def _largest(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """For each tensor the places of its entries that are among the `n` largest of all."""
    best = [score.topk(min(n, len(score))) for score in scores]
    values = torch.cat([b.values.float().cpu() for b in best])
    chosen = values.topk(min(n, len(values))).indices
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[chosen] = True
    parts = keep.split([len(b.values) for b in best])
    return [b.indices.cpu()[part] for b, part in zip(best, parts, strict=True)]
