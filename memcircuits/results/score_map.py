"""TODO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.core.heads import Head
from memcircuits.core.statistics import finite_mean
from memcircuits.results.provenance import Provenance, same_basis
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


def largest(values: Float[Tensor, "layer head"], k: int) -> list[Head]:
    """The heads with the `k` largest finite values, largest first; ties by layer and head."""
    flat, n = values.flatten(), values.shape[1]
    order = torch.argsort(flat.nan_to_num(nan=-torch.inf), descending=True, stable=True)
    return [Head(int(i) // n, int(i) % n) for i in order[flat.isfinite()[order]][:k]]


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
        notes: anything the reader must know, such as a fallback taken.
        axis: name of the second axis, `head` or `kv_head`.
    """

    name: str
    units: str
    values: Float[Tensor, "layer head"]
    provenance: Provenance
    samples: Mapping[str, Float[Tensor, "paragraph layer head"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    axis: str = "head"

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
        """The mean of another measure of the same run, for instance `em`."""
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

        Heads whose value is not finite are no candidates.
        """
        return largest(self.values, k)

    def correlation(self, other: ScoreMap) -> float:
        """Spearman's rank correlation over heads with another measurement: do the two agree?

        Args:
            other: another `ScoreMap` of a model with the same heads, in the same basis.

        Returns:
            Between -1 and 1 over the heads where both are finite; NaN where one is constant.

        Raises:
            InputError: if one was measured with folded weights and the other with raw ones, where
                the same head means something else, or if the heads are not the same.
        """
        from scipy.stats import spearmanr

        same_basis("other", self.provenance, other.provenance)
        if self.values.shape != other.values.shape or self.axis != other.axis:
            here, there = tuple(self.values.shape), tuple(other.values.shape)
            raise InputError(
                "other", f"{there} by {other.axis}", f"compare with one of {here} by {self.axis}"
            )
        both = self.values.isfinite() & other.values.isfinite()
        a, b = self.values[both], other.values[both]
        if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
            return float("nan")
        return float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)

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
