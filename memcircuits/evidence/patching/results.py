"""Results of activation patching: one effect per head, or per layer and position.

An effect is the metric of the patched run minus that of the run patched into (the base run). The
total effect is the metric of the source run minus that of the base run. Their ratio, the normalized
effect,

    share = mean effect / mean total effect,

tells how far a patch moves the base run towards the source run: 0 is no change, 1 is the whole
difference, and a negative share leads away from the source run. Means are over the pairs whose
effects are all finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.base.statistics import finite_mean, finite_rows
from memcircuits.evidence.patching.metrics import METRIC_UNITS, effect_colours
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap, largest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PatchMap(ScoreMap, kind="patch-map"):
    """Effect of patching each head, or each group of neurons, by itself.

    Attributes beside `ScoreMap`'s:
        base: metric -> its value in the run patched into, [paragraph].
        source: metric -> its value in the run that the activations come from, [paragraph].
        exact: attribution only: the exact effect of the heads that were checked, NaN elsewhere,
            [layer, head].
        agreement: attribution only: Pearson correlation of estimate and exact effect over the heads
            checked (`all`), the `top` ones and the `random` ones.
    """

    base: Mapping[str, Float[Tensor, " paragraph"]] = field(default_factory=dict)
    source: Mapping[str, Float[Tensor, " paragraph"]] = field(default_factory=dict)
    exact: Tensor = field(default_factory=lambda: torch.empty(0))
    agreement: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> Float[Tensor, "layer head"]:
        """Normalized effect: mean effect over mean total effect; 1 reaches the source run."""
        return normalized_effect(self)

    def top(self, k: int = 10) -> list[Head]:
        """The `k` heads with the largest normalized effect, largest first."""
        return largest(self.share, k)

    def measure(self, name: str) -> ScoreMap:
        """The mean effect on another metric of the same runs, for instance `em`.

        Raises:
            InputError: if it was not measured.
        """
        return dataclasses.replace(super().measure(name), units=METRIC_UNITS.get(name, ""))

    def figure(self) -> Any:
        """A layer x head map around zero (plotly); `figures.patching_map` sets several together."""
        from memcircuits.display import figures

        return figures.heatmap(
            self.values,
            title=self.name,
            units=self.units,
            diverging=True,
            **effect_colours(next(iter(self.samples))),
            col_label=self.axis.replace("_", "-"),
        )

    def to_frame(self) -> pd.DataFrame:
        """Effects: `layer, head` (or `kv_head`), `value`, further metrics, `share`, `exact`."""
        frame = super().to_frame()
        frame["share"] = self.share.flatten().double().cpu().numpy()
        if self.exact.numel():
            frame["exact"] = self.exact.flatten().double().numpy()
        return frame

    def __str__(self) -> str:
        best = self.top(1)
        text = super().__str__()
        if not best:
            return text
        layer, index = best[0]
        name = f"L{layer}.neurons{index}" if self.axis == "neuron_group" else str(best[0])
        return f"{text}; {name} carries most, {float(self.share[best[0]]):.1%}"


@dataclass(frozen=True)
class LayerPatches(Result, kind="layer-patches"):
    """Effect of patching each layer at each prefix position.

    Attributes:
        name: what was patched.
        units: units of `values`.
        values: mean over pairs, [layer, pos]; one column per position swept.
        whole: mean effect of patching the layer at all positions at once, [layer].
        positions: the positions swept.
        samples: metric -> [paragraph, layer, pos]; the first one is `values` before averaging.
        base: metric -> its value in the run patched into, [paragraph].
        source: metric -> its value in the run that the activations come from, [paragraph].
        provenance: where the numbers come from.
        notes: what the reader must know.
    """

    name: str
    units: str
    values: Float[Tensor, "layer pos"]
    whole: Float[Tensor, " layer"]
    positions: tuple[int, ...]
    samples: Mapping[str, Float[Tensor, "paragraph layer pos"]]
    base: Mapping[str, Float[Tensor, " paragraph"]]
    source: Mapping[str, Float[Tensor, " paragraph"]]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values.shape != (len(self.whole), len(self.positions)):
            raise InputError("values", tuple(self.values.shape), "give [layer, pos]")

    @property
    def share(self) -> Float[Tensor, "layer pos"]:
        """Normalized effect: mean effect over mean total effect; 1 reaches the source run."""
        return normalized_effect(self)

    def to_frame(self) -> pd.DataFrame:
        """Effects: columns `layer, position, value`, further metrics and `share`."""
        import pandas as pd

        n_layers = len(self.whole)
        columns: dict[str, Any] = {
            "layer": [layer for layer in range(n_layers) for _ in self.positions],
            "position": list(self.positions) * n_layers,
            "value": self.values.flatten().double().numpy(),
        }
        for name, sample in list(self.samples.items())[1:]:
            columns[name] = finite_mean(sample).flatten().double().numpy()
        columns["share"] = self.share.flatten().double().cpu().numpy()
        return pd.DataFrame(columns)

    def figure(self) -> Any:
        """A layer x position map around zero (plotly)."""
        from memcircuits.display import figures

        return figures.heatmap(
            self.values,
            title=self.name,
            units=self.units,
            diverging=True,
            **effect_colours(next(iter(self.samples))),
            col_label="position",
            col_names=[str(position) for position in self.positions],
        )

    def __str__(self) -> str:
        n_layers, n_positions = self.values.shape
        return f"{self.name} [{self.units}], {n_layers} layers x {n_positions} positions"


def normalized_effect(patches: PatchMap | LayerPatches) -> Float[Tensor, "layer unit"]:
    """Mean effect on the chosen metric over its mean total effect; see the module's docstring."""
    metric = next(iter(patches.samples))
    finite = finite_rows(patches.samples[metric])
    total_effect = (patches.source[metric] - patches.base[metric])[finite]
    return patches.values / total_effect.mean()
