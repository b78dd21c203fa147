"""What transplants do: necessity and sufficiency of every component, paragraph by paragraph.

The *total effect* is the NLL of the twin minus that of the model: what the model remembers, in
nats/token. A component whose necessity is that much carries all of it alone. Effects of components
need not add up to the total: several may be needed together, or each may do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.components import Component, Unit
from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import bootstrap_interval, finite_mean, finite_rows
from memcircuits.evidence.transplants.components import HEAD_MATRICES
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block

Patched = Literal["weights", "activations"]
"""What of a component is transplanted."""

Measure = Literal["necessity", "sufficiency"]
"""What the model loses, or the twin gains, by a transplant."""

MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Transplant(Result, kind="transplant"):
    """Effects of transplanting each component by itself.

    Attributes:
        patched: `weights` or `activations`.
        units: the sort of each component (`memcircuits.evidence.transplants.components`).
        layers: its layer; -1 for `rest` and `all`.
        heads: its head; -1 where there is none.
        groups: its group of neurons; -1 where there is none.
        samples: `necessity`, the rise of the model's NLL with the twin's component, and
            `sufficiency`, the fall of the twin's NLL with the model's component, nats/token;
            `em_lost` and `em_gained`, the same in tokens; [paragraph, component] each. Paragraphs
            with non-finite numbers stay here and enter no mean.
        nll: NLL of the model, nats/token, [paragraph].
        twin_nll: NLL of the twin.
        names: the paragraphs' names.
        provenance: where the numbers come from; `options` names the twin.
        notes: what the reader must know.
        independent: number of each paragraph's independent group, [paragraph]; None: each is its
            own.
    """

    patched: Patched
    units: tuple[Unit, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    samples: Mapping[str, Float[Tensor, "paragraph component"]]
    nll: Float[Tensor, " paragraph"]
    twin_nll: Float[Tensor, " paragraph"]
    names: tuple[str, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    independent: Int[Tensor, " paragraph"] | None = None

    @property
    def components(self) -> list[Component]:
        """The components, in the order of the samples."""
        columns = zip(self.units, self.layers, self.heads, self.groups, strict=True)
        return [Component(*column) for column in columns]

    @property
    def total(self) -> float:
        """Mean NLL of the twin minus that of the model, nats/token."""
        difference = (self.twin_nll - self.nll)[:, None]
        return float(finite_mean(difference, self.independent))

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per component.

        Columns `unit, layer, head, group`, empty where a component has none; `necessity` and
        `sufficiency` in nats/token with their 95 % intervals over independent groups of paragraphs
        (`_low`, `_high`; NaN for a single group) and their share of the total effect (`_share`);
        `em_lost` and `em_gained` in tokens.

        Args:
            seed: seed of the bootstrap.
        """
        import pandas as pd

        data: dict[str, Any] = {"unit": self.units}
        for name, column in (("layer", self.layers), ("head", self.heads), ("group", self.groups)):
            data[name] = pd.array([None if i < 0 else i for i in column], dtype="Int64")
        for measure in MEASURES:
            finite = finite_rows(self.samples[measure])
            groups = None if self.independent is None else self.independent[finite]
            low, high = torch.full((2, len(self.units)), torch.nan)
            if finite.any():
                samples = self.samples[measure][finite]
                low, high = bootstrap_interval(samples, groups, seed=seed)
            mean = finite_mean(self.samples[measure], self.independent)
            data[measure] = mean.double().numpy()
            data[f"{measure}_low"], data[f"{measure}_high"] = low.numpy(), high.numpy()
            data[f"{measure}_share"] = (mean / self.total).double().numpy()
        for name in ("em_lost", "em_gained"):
            data[name] = finite_mean(self.samples[name], self.independent).double().numpy()
        return pd.DataFrame(data)

    def map(self, measure: Measure = "necessity", unit: Unit = "head") -> ScoreMap:
        """The effects of all heads (or of their halves) as a map of layers and heads.

        Args:
            measure: `necessity` or `sufficiency`.
            unit: `head`, `qk` or `ov`.

        Raises:
            InputError: for another measure or unit, or one that was not measured.
        """
        one_of("measure", measure, MEASURES)
        one_of("unit", unit, HEAD_MATRICES)
        columns = [i for i, name in enumerate(self.units) if name == unit]
        if not columns:
            raise InputError(
                "unit", repr(unit), f"measured were {', '.join(dict.fromkeys(self.units))}"
            )
        n_layers = max(self.layers) + 1
        samples = self.samples[measure][:, columns].unflatten(1, (n_layers, -1)).contiguous()
        return ScoreMap(
            name=f"{measure} of {self.patched}" + ("" if unit == "head" else f", {unit}"),
            units="nats/token",
            values=finite_mean(samples, self.independent),
            provenance=self.provenance,
            samples={measure: samples},
            notes=self.notes,
        )

    def _grid(self, measure: Measure) -> tuple[Tensor, list[str]]:
        """Heads, then attention, MLP and layer as a whole: values [layer, column], names."""
        n_layers = max(self.layers) + 1
        mean = finite_mean(self.samples[measure], self.independent)
        rows: dict[str, Tensor] = {}
        for part, value in zip(self.components, mean, strict=True):
            if part.layer >= 0 and part.unit in ("head", "attn", "mlp", "layer"):
                name = str(part.head) if part.unit == "head" else part.unit
                rows.setdefault(name, torch.full((n_layers,), torch.nan))[part.layer] = value
        order = sorted(
            rows, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
        )
        return torch.stack([rows[name] for name in order], 1), order

    def figure(self) -> Any:
        """Necessity beside sufficiency, a row per layer; heads, attention, MLP, layer (plotly)."""
        from memcircuits.display import figures

        grids = {measure: self._grid(measure) for measure in MEASURES}
        return figures.patching_map(
            {measure: grid for measure, (grid, _) in grids.items()},
            title=f"Transplanted {self.patched}: {self}",
            name="effect",
            units="nats/token",
            col_label="head, or part of the layer",
            col_names=grids["necessity"][1],
        )

    def blocks(self) -> list[Block]:
        """Two maps and a table for a page."""
        from memcircuits.display.pages import Heatmap, Table

        notes = {
            "necessity": "How much worse the model predicts the paragraphs with the twin's "
            f"{self.patched} of a component.",
            "sufficiency": "How much better the twin predicts them with the model's "
            f"{self.patched} of a component.",
        }
        blocks: list[Block] = []
        for measure in MEASURES:
            values, names = self._grid(measure)
            blocks.append(
                Heatmap(
                    values,
                    name=measure,
                    units="nats/token",
                    diverging=True,
                    col_names=names,
                    title=measure.capitalize(),
                    note=notes[measure],
                )
            )
        frame = self.to_frame()
        frame.insert(0, "component", [str(part) for part in self.components])
        frame = frame.drop(columns=["layer", "head", "group"])
        ranked = frame.sort_values("necessity", ascending=False, kind="stable")
        return [*blocks, Table(ranked, title="All components", help=notes)]

    def __str__(self) -> str:
        n = len(self.units)
        return f"{n} components, {len(self.names)} paragraphs, {self.total:.3f} nats/token in all"
