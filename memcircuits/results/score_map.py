"""`ScoreMap`: one number per head, the shape of most answers of this package.

Ablation, patching and attention all ask the same of every head, and answer on a grid of layers and
heads. `ScoreMap` holds that grid with its name, units and provenance, and the values of each
paragraph from which it was averaged, so that intervals and other averages can be had later. Heads
are ranked by `top`; `correlation` asks whether two measurements rank them alike.

Key and value activations of grouped-query models belong to key-value heads, which several query
heads share: there the second axis counts those, and `axis` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.base.statistics import finite_mean
from memcircuits.results.provenance import Provenance, same_basis
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

Axis = Literal["head", "kv_head", "neuron_group"]
"""What the second axis of a `ScoreMap` counts: query heads, the key-value heads that they share, or
groups of neurons."""


def largest(values: Float[Tensor, "layer head"], k: int) -> list[Head]:
    """The heads with the `k` largest finite values, largest first; ties by layer and head."""
    flat = values.flatten()
    candidates = flat.isfinite().nonzero().flatten()
    order = flat[candidates].argsort(descending=True, stable=True)
    n_heads = values.shape[1]
    return [Head(i // n_heads, i % n_heads) for i in candidates[order][:k].tolist()]


@dataclass(frozen=True)
class ScoreMap(Result, kind="score-map"):
    """One number per head, kept per paragraph where it was measured so.

    Attributes:
        name: what was measured.
        units: units of `values`.
        values: [layer, head]; for key and value sites of grouped-query models the second axis is
            the key-value head, and `axis` says so.
        provenance: where the numbers come from.
        samples: measure -> [paragraph, layer, head]; the first one is `values` before averaging.
            Paragraphs with non-finite numbers stay here, enter no mean, and `notes` counts them.
        notes: what the reader must know about the numbers, such as a fallback taken.
        axis: name of the second axis, see `Axis`.
    """

    name: str
    units: str
    values: Float[Tensor, "layer head"]
    provenance: Provenance
    samples: Mapping[str, Float[Tensor, "paragraph layer head"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    axis: Axis = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values.ndim != 2:
            raise InputError("values", tuple(self.values.shape), "give one number per layer, head")
        for name, sample in self.samples.items():
            if sample.shape[1:] != self.values.shape:
                raise InputError(name, tuple(sample.shape), "give [paragraph, layer, head]")

    def __getitem__(self, head: Head | tuple[int, int]) -> float:
        return float(self.values[head[0], head[1]])

    def measure(self, name: str) -> ScoreMap:
        """The mean of another measure of the same run, for instance `em`.

        Raises:
            InputError: if it was not measured.
        """
        if name not in self.samples:
            raise InputError("name", repr(name), "choose one of " + ", ".join(self.samples))
        return dataclasses.replace(
            self,
            name=f"{self.name}: {name}",
            units="tokens" if name == "em" else self.units,
            values=finite_mean(self.samples[name]),
            samples={name: self.samples[name]},
        )

    def top(self, k: int = 10) -> list[Head]:
        """The `k` heads with the largest values, largest first; ties by layer and head.

        Heads whose value is not finite are left out.
        """
        return largest(self.values, k)

    def correlation(self, other: ScoreMap) -> float:
        """Spearman's rank correlation with another measurement over the heads.

        Args:
            other: another `ScoreMap` of a model with the same heads, in the same basis.

        Returns:
            Between -1 and 1 over the heads where both are finite; NaN where one is constant.

        Raises:
            InputError: if one was measured with folded weights and the other with raw ones, or if
                the heads are not the same.
        """
        from scipy.stats import spearmanr

        same_basis("other", self.provenance, other.provenance)
        if self.values.shape != other.values.shape or self.axis != other.axis:
            own_shape, other_shape = tuple(self.values.shape), tuple(other.values.shape)
            raise InputError(
                "other",
                f"{other_shape} by {other.axis}",
                f"compare with one of {own_shape} by {self.axis}",
            )
        finite = self.values.isfinite() & other.values.isfinite()
        own_values, other_values = self.values[finite], other.values[finite]
        if len(own_values) < 2 or _constant(own_values) or _constant(other_values):
            return float("nan")
        ranks = spearmanr(own_values.double().numpy(), other_values.double().numpy())
        return float(ranks.statistic)

    def to_frame(self) -> pd.DataFrame:
        """Columns `layer, head, value` and the mean of every further measure."""
        import pandas as pd

        layers, heads = self.values.shape
        grid = torch.cartesian_prod(torch.arange(layers), torch.arange(heads))
        data = {
            "layer": grid[:, 0].numpy(),
            self.axis: grid[:, 1].numpy(),
            "value": self.values.flatten().double().cpu().numpy(),
        }
        for name, sample in list(self.samples.items())[1:]:
            data[name] = finite_mean(sample).flatten().double().cpu().numpy()
        return pd.DataFrame(data)

    def figure(self) -> Any:
        """A layer x head heatmap (plotly)."""
        from memcircuits.display import figures

        return figures.heatmap(
            self.values,
            title=self.name,
            units=self.units,
            col_label=self.axis.replace("_", "-"),
        )

    def __str__(self) -> str:
        return f"{self.name} [{self.units}], {self.values.shape[0]} layers x {self.values.shape[1]}"


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())
