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
from memcircuits.core.statistics import finite_mean, finite_rows, left_out
from memcircuits.evidence.interventions import FALLBACK
from memcircuits.evidence.patching.pairs import UNITS, Pair, colours
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap, largest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PatchMap(ScoreMap, kind="patch-map"):
    """Effect of patching each head; see the module's docstring.

    Attributes beside `ScoreMap`'s:
        base: metric -> of the run patched into, [paragraph].
        source: metric -> of the run that the activations come from, [paragraph].
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
        """How much of the way to the other run each patch goes; negative: away from it."""
        return normalized_effect(self)

    def top(self, k: int = 10) -> list[Head]:
        """The `k` heads that carry the largest share."""
        return largest(self.share, k)

    def measure(self, name: str) -> ScoreMap:
        """The mean effect on another metric of the same run, for instance `em`."""
        return dataclasses.replace(super().measure(name), units=UNITS.get(name, ""))

    def figure(self) -> Any:
        """A layer x head map around zero (plotly); `figures.patching_map` sets several together."""
        from memcircuits.display import figures

        return figures.heatmap(
            self.values,
            title=self.name,
            units=self.units,
            diverging=True,
            **colours(next(iter(self.samples))),
            col_label=self.axis.replace("_", "-"),
        )

    def to_frame(self) -> pd.DataFrame:
        """Changes: `layer, head` (or `kv_head`), `value`, further metrics, `share`, `exact`."""
        frame = super().to_frame()
        frame["share"] = self.share.flatten().double().cpu().numpy()
        if self.exact.numel():
            frame["exact"] = self.exact.flatten().double().numpy()
        return frame

    def __str__(self) -> str:
        best = self.top(1)
        most = f"; {best[0]} carries most, {float(self.share[best[0]]):.1%}" if best else ""
        return f"{super().__str__()}{most}"


@dataclass(frozen=True)
class LayerPatches(Result, kind="layer-patches"):
    """Effect of patching each layer at each prefix position.

    Attributes:
        name: what was patched.
        units: units of `values`.
        values: mean over pairs, [layer, pos]; one column per position swept.
        whole: the layer patched at all positions at once, [layer].
        positions: the positions swept.
        samples: metric -> [paragraph, layer, pos]; the first one is `values` before averaging.
        base: metric -> of the run patched into, [paragraph].
        source: metric -> of the run that the activations come from, [paragraph].
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
        """How much of the way to the other run each patch goes; negative: away from it."""
        return normalized_effect(self)

    def to_frame(self) -> pd.DataFrame:
        """Changes by patching: columns `layer, position, value`, further metrics and `share`."""
        import pandas as pd

        layers = len(self.whole)
        data: dict[str, Any] = {
            "layer": [layer for layer in range(layers) for _ in self.positions],
            "position": list(self.positions) * layers,
            "value": self.values.flatten().double().numpy(),
        }
        for name, sample in list(self.samples.items())[1:]:
            data[name] = finite_mean(sample).flatten().double().numpy()
        data["share"] = self.share.flatten().double().cpu().numpy()
        return pd.DataFrame(data)

    def figure(self) -> Any:
        """A layer x position map (plotly)."""
        from memcircuits.display import figures

        return figures.heatmap(
            self.values,
            title=self.name,
            units=self.units,
            diverging=True,
            **colours(next(iter(self.samples))),
            col_label="position",
            col_names=[str(position) for position in self.positions],
        )

    def __str__(self) -> str:
        layers, positions = self.values.shape
        return f"{self.name} [{self.units}], {layers} layers x {positions} positions"


def normalized_effect(patches: PatchMap | LayerPatches) -> Tensor:
    name = next(iter(patches.samples))
    whole = (patches.source[name] - patches.base[name])[finite_rows(patches.samples[name])]
    return patches.values / whole.mean()


def effect_notes(pair: Pair, samples: Tensor) -> tuple[str, ...]:
    same = int((~pair.changed.any(-1)).sum())
    notes = left_out(finite_rows(samples))
    if same:
        text = f"{same} of {len(pair)} pairs have equal prefixes: patching changes nothing there"
        notes = (text, *notes)
    return notes if pair.adapter.supports_partial_forward else (FALLBACK, *notes)
