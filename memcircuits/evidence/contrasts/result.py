"""`Contrast`: two sets of paragraphs, feature by feature, and what their labels could give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block

Family = Literal["text", "probability", "hidden state"]
"""What a feature is a number of."""

FAMILIES: tuple[Family, ...] = get_args(Family)

STATISTICS = (
    "memorized",
    "control",
    "difference",
    "ci_low",
    "ci_high",
    "auc",
    "p_value",
    "q_value",
)
"""Means of the two sets; their difference with its 95 % interval; the probability that a memorized
paragraph has a larger value than a control; p-value and q-value over all features."""


@dataclass(frozen=True)
class Contrast(Result, kind="contrast"):
    """How memorized paragraphs differ from controls.

    Attributes:
        features: name of each feature.
        family: what it is a number of, see `Family`.
        place: where a hidden state was read, else empty.
        layer: layer of a hidden state (0 is the embedding), else -1.
        memorized: [paragraph, feature]; NaN where a feature is not defined.
        control: [paragraph, feature].
        statistics: see `STATISTICS`, [feature] each.
        provenance: where the numbers come from.
        notes: what the reader must know.
    """

    features: tuple[str, ...]
    family: tuple[str, ...]
    place: tuple[str, ...]
    layer: tuple[int, ...]
    memorized: Float[Tensor, "paragraph feature"]
    control: Float[Tensor, "paragraph feature"]
    statistics: Mapping[str, Float[Tensor, " feature"]]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in {"memorized": self.memorized, "control": self.control}.items():
            if values.ndim != 2 or values.shape[1] != len(self.features):
                raise InputError(name, tuple(values.shape), "give [paragraph, feature]")

    def rows(self, family: Family) -> list[int]:
        """Indices of the features of one family."""
        one_of("family", family, FAMILIES)
        return [i for i, name in enumerate(self.family) if name == family]

    def to_frame(self) -> pd.DataFrame:
        """Columns `family, feature, place, layer` and the `STATISTICS`; one row per feature."""
        import pandas as pd

        data: dict[str, Any] = {
            "family": self.family,
            "feature": self.features,
            "place": self.place,
            "layer": [None if layer < 0 else layer for layer in self.layer],
        }
        data |= {name: self.statistics[name].double().numpy() for name in STATISTICS}
        return pd.DataFrame(data).astype({"layer": "Int64"})

    def by_layer(self) -> pd.DataFrame:
        """Hidden states only: columns `set` (feature and place), `layer`, `difference`, `auc`."""
        frame = self.to_frame()
        frame = frame[frame["family"] == "hidden state"]
        frame = frame.assign(set=frame["feature"] + ", " + frame["place"])
        columns = {"ci_low": "difference_low", "ci_high": "difference_high"}
        return frame.rename(columns=columns).reset_index(drop=True)

    def figure(self) -> Any:
        """AUC of every hidden-state feature, layer by layer (plotly)."""
        from memcircuits.display import figures

        return figures.curves(
            self.by_layer()[["set", "layer", "auc"]],
            "layer",
            {"auc": "AUC"},
            title=str(self),
            x_label="layer (0 is the embedding)",
        )

    def block(self) -> Block:
        """The table as a block of a page."""
        from memcircuits.display.pages import Table

        return Table(
            self.to_frame(),
            title="Memorized paragraphs and controls",
            help={
                "difference": "mean of memorized paragraphs minus mean of controls",
                "auc": "probability that a memorized paragraph has a larger value than a control",
                "direction": "projection on the difference of the two means, which were taken "
                "without the paragraph",
                "stability": "cosine of the state with what it is after one prefix token is "
                "replaced",
            },
        )

    def __str__(self) -> str:
        significant = self.statistics["q_value"] < 0.05
        counts = ", ".join(
            f"{int(significant[self.rows(family)].sum())} of {len(self.rows(family))} {family}"
            for family in FAMILIES
        )
        return (
            f"{len(self.memorized)} memorized paragraphs against {len(self.control)} controls: "
            f"features that differ (q < 0.05): {counts}"
        )
