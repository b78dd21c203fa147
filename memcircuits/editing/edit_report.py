"""What an edit did: measures before and after it, with intervals over independent paragraphs.

`memcircuits.editing.evaluation.evaluate_edit` makes an `EditReport`; `edit_arms` puts several of
them side by side for a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import (
    DRAWS,
    bootstrap_interval,
    bootstrap_means,
    group_means,
    interval,
)
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

MEASURE_UNITS = {
    "em": "tokens",
    "em_attacked": "tokens",
    "nll": "nats/token",
    "bits": "bits",
    "loose_match": "share of tokens",
    "extraction": "probability",
    "in_full": "share of paragraphs",
    "kl": "nats/token",
    "perplexity": "perplexity",
}

_SET_LABELS = {"control/em": "control, own text", "control/kl": "control, own text"}


@dataclass(frozen=True)
class EditReport(Result, kind="edit-report"):
    """Measures before and after an edit.

    Attributes:
        samples: `set/measure` -> [moment, paragraph]; the moments are before and after the edit.
        n_samples: samples that `extraction` allows an attacker.
        provenance: where the numbers come from.
        groups: set -> number of each paragraph's independent group; of a set that is not there,
            each paragraph is its own group.
        notes: what the reader must know.
    """

    samples: Mapping[str, Float[Tensor, "moment paragraph"]]
    n_samples: int
    provenance: Provenance
    groups: Mapping[str, Int[Tensor, " paragraph"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def group_samples(self, name: str) -> Float[Tensor, "moment group"]:
        """A measure before and after the edit, averaged within independent groups."""
        groups = self.groups.get(name.partition("/")[0])
        return group_means(self.samples[name].T, groups).T

    def mean(self, name: str) -> tuple[float, float]:
        """Means over groups before and after the edit, for instance of `memorized/em`."""
        if name not in self.samples:
            raise InputError("name", repr(name), "choose one of " + ", ".join(self.samples))
        before, after = self.group_samples(name).double().mean(-1).tolist()
        return before, after

    def to_frame(self) -> pd.DataFrame:
        """Columns `set, measure, units, before, after, change, ci_low, ci_high, n, n_groups`.

        `ci_low` and `ci_high` bound the 95 % interval of the mean change over independent groups of
        paragraphs (NaN for a single group), `n` counts paragraphs. Perplexity is the exponential of
        the mean NLL. `control, own text` is what the model itself writes after the controls'
        prefixes.
        """
        import pandas as pd

        rows = []
        for name, samples in self.samples.items():
            group, _, measure = name.partition("/")
            before, after = self.group_samples(name)
            generator = torch.Generator().manual_seed(0)
            resampled = bootstrap_means(torch.stack([before, after], -1), DRAWS, generator)
            means = torch.stack([before.mean(), after.mean()])
            if measure == "perplexity":
                resampled, means = resampled.exp(), means.exp()
            low, high = interval(resampled[:, 1] - resampled[:, 0]).tolist()
            if len(before) == 1:
                low = high = math.nan
            rows.append(
                {
                    "set": _SET_LABELS.get(name, group),
                    "measure": measure,
                    "units": MEASURE_UNITS[measure],
                    "before": float(means[0]),
                    "after": float(means[1]),
                    "change": float(means[1] - means[0]),
                    "ci_low": low,
                    "ci_high": high,
                    "n": samples.shape[1],
                    "n_groups": len(before),
                }
            )
        return pd.DataFrame(rows)

    def figure(self) -> Any:
        """EM before and after, of targets and controls (plotly; the paper's figure 5)."""
        from memcircuits.display import figures

        return figures.arms(
            edit_arms({"before": self, "after": self}),
            title="Recitation before and after the edit",
        )

    def __str__(self) -> str:
        em = self.mean("memorized/em")
        own, kl = self.mean("control/em"), self.mean("control/kl")
        text = f"memorized EM {em[0]:.1f} -> {em[1]:.1f}, "
        if "memorized/em_attacked" in self.samples:
            text += f"with other prefixes {self.mean('memorized/em_attacked')[1]:.1f}, "
        if "others/in_full" in self.samples:
            kept = self.samples["others/in_full"]
            text += f"others still recited {int(kept[1].sum())} of {int(kept[0].sum())}, "
        return (
            f"{text}controls' own continuations {own[0]:.1f} -> {own[1]:.1f} tokens, "
            f"KL {kl[1]:.2g} nats/token"
        )


def edit_arms(reports: Mapping[str, EditReport]) -> pd.DataFrame:
    """EM of several edits of one model side by side, for `memcircuits.display.figures.bars.arms`.

    Args:
        reports: name of the arm -> its report. An arm named `before` shows the numbers of its
            report before the edit, every other arm the numbers after it.

    Returns:
        Columns `arm, set, value, value_low, value_high` (tokens, 95 % over groups), for the
        targets, the targets under attack where that was measured, and the controls' own
        continuations.
    """
    import pandas as pd

    sets = {
        "memorized": "memorized/em",
        "memorized, under attack": "memorized/em_attacked",
        "control": "control/em",
    }
    rows = []
    for name, measure in sets.items():
        for arm, report in reports.items():
            if measure not in report.samples:
                continue
            values = report.group_samples(measure)[0 if arm == "before" else 1].float()
            low, high = bootstrap_interval(values).tolist()
            rows.append(
                {
                    "arm": arm,
                    "set": name,
                    "value": float(values.mean()),
                    "value_low": low,
                    "value_high": high,
                }
            )
    return pd.DataFrame(rows)
