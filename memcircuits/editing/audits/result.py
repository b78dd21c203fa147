"""What an audit measured: the edited model between the unedited one and the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.statistics import (
    DRAWS,
    bootstrap_interval,
    bootstrap_means,
    group_means,
    interval,
)
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.audits.verdict import (
    Recited,
    Verdict,
    shortfalls,
    verdict_of,
    ways_back,
)
from memcircuits.editing.edit_report import EditReport
from memcircuits.measure.recitation_statistics import extraction_probability
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

ReferenceKind = Literal["twin", "stand-in"]

ARMS = ("unedited", "edited", "reference")

UNITS = {
    "depth": "share",
    "remembered": "share of bits",
    "kl_to_reference": "nats/token",
    "nll": "nats/token",
    "bits": "bits",
    "loose_match": "share of tokens",
    "extraction": "probability",
}
"""Units of the measures that are not tokens."""


@dataclass(frozen=True)
class EditAudit(Result, kind="edit-audit"):
    """An edit against the model that it should have led to.

    Attributes:
        ids: the targets, [paragraph, pos].
        n_prefix: tokens of their prefix.
        names: of the targets.
        token_log_prob: log p of every continuation token, nats, [arm, paragraph, pos]; the arms
            are the unedited model, the edited one and the reference.
        samples: measure -> [arm, paragraph], see `memcircuits.editing.audits.measures`; NaN where
            a stand-in cannot be measured.
        relearning: text trained on -> EM [arm, step, paragraph], the first step before any
            training. Without a twin the arms are the first two.
        layer_nll: NLL of the unedited model with the residual stream of another model behind each
            layer, nats/token, [source, layer, paragraph]; the sources are the unedited model, the
            edited one and the reference. None without a twin of the same shape.
        harm: `set/measure` -> [moment, paragraph], as in `EditReport`.
        reference: `twin`, or the `stand-in` where there is none.
        n_attacks: attacked prefixes for each target.
        n_samples: samples that `extraction` allows an attacker.
        weights_auc: probability that a weight of the given truth changed more than another one;
            None without a truth.
        groups: set -> number of each paragraph's independent group.
        provenance: where the numbers come from.
        notes: what the reader must know.
        bos: ids of the tokens in front of every paragraph.
    """

    ids: Int[Tensor, "paragraph pos"]
    n_prefix: int
    names: tuple[str, ...]
    token_log_prob: Float[Tensor, "arm paragraph pos"]
    samples: Mapping[str, Float[Tensor, "arm paragraph"]]
    relearning: Mapping[str, Float[Tensor, "arm step paragraph"]]
    layer_nll: Float[Tensor, "source layer paragraph"] | None
    harm: Mapping[str, Float[Tensor, "moment paragraph"]]
    reference: ReferenceKind
    n_attacks: int
    n_samples: int
    weights_auc: float | None
    groups: Mapping[str, Int[Tensor, " paragraph"]]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    bos: tuple[int, ...] = field(default=())

    @property
    def bits(self) -> Float[Tensor, "arm paragraph"]:
        """Bits that each continuation costs to encode with each arm."""
        return -self.token_log_prob.double().sum(-1) / math.log(2)

    @property
    def depth(self) -> tuple[float, float, float]:
        """Erasure depth, 1 - KL(reference || edited) / KL(reference || unedited), and interval."""
        kl = self.samples["kl"]
        value, low, high = self._ratio(kl[1], kl[0])
        return 1 - value, 1 - high, 1 - low

    @property
    def remembered(self) -> tuple[float, float, float]:
        """Bits remembered beyond the reference, as a share of what there was, and interval."""
        unedited, edited, reference = self.bits
        return self._ratio(reference - edited, reference - unedited)

    def _ratio(self, part: Tensor, whole: Tensor) -> tuple[float, float, float]:
        """Ratio of two means over groups, with its 95 % interval (NaN for a single group)."""
        pairs = group_means(torch.stack([part, whole], -1).double(), self.groups["targets"])
        mean = pairs.mean(0)
        low = high = math.nan
        if len(pairs) > 1:
            resampled = bootstrap_means(pairs, DRAWS, torch.Generator().manual_seed(0))
            low, high = interval(resampled[:, 0] / resampled[:, 1]).tolist()
        return float(mean[0] / mean[1]), low, high

    def _mean(self, values: Float[Tensor, " paragraph"]) -> float:
        return float(group_means(values.float(), self.groups["targets"]).mean())

    @cached_property
    def recited(self) -> dict[str, Recited]:
        """Way back -> mean tokens that it brings back; what a stand-in cannot tell is its EM."""
        own = self.samples["em"]
        values = {
            name: samples
            for name, samples in self.samples.items()
            if name.startswith("em") or name == "longest_run"
        }
        whole = {"longest_run": self.samples["longest_run"][0]}
        for text, curve in self.relearning.items():
            best = curve.float().amax(1)
            if len(best) == 2:
                best = torch.cat([best, torch.full_like(best[:1], torch.nan)])
            values[f"training on {text}"] = best
            whole[f"training on {text}"] = curve[0, 0]
        return {
            name: Recited(
                edited=self._mean(samples[1]),
                reference=self._mean(samples[2].where(samples[2].isfinite(), own[2])),
                unedited=self._mean(whole.get(name, own[0])),
            )
            for name, samples in values.items()
        }

    @property
    def ways_back(self) -> tuple[str, ...]:
        """What brings at least half of the recitation back."""
        return ways_back(self.recited)

    @property
    def verdict(self) -> Verdict:
        """The audit in words, see `memcircuits.editing.audits.verdict`."""
        moved = self.samples["kl_unedited"]
        em = self.samples["em"]
        return verdict_of(
            *self._judged,
            moved=self._ratio(moved[1], moved[2])[0],
            same_em=torch.equal(em[0], em[1]),
        )

    @property
    def _judged(self) -> tuple[dict[str, Recited], tuple[float, float], tuple[float, float]]:
        """What a verdict is about, with the bounds that speak against the edit."""
        depth, remembered = self.depth, self.remembered
        return self.recited, (depth[0], depth[1]), (remembered[0], remembered[2])

    @property
    def reading(self) -> tuple[str, ...]:
        """What the verdict rests on: conditions that failed, rows that are no evidence."""
        said = []
        if failed := shortfalls(*self._judged):
            said.append(f"Not erased: {'; '.join(failed)}.")
        idle = [
            name
            for name, arms in self.samples.items()
            if name.startswith("em_") and self._mean(arms[0]) < 1
        ]
        if idle:
            said.append(
                f"No evidence: {', '.join(idle)}. Such prefixes or roundings do not bring the "
                "text out of the unedited model either."
            )
        if self.reference == "stand-in":
            said.append(
                "The stand-in cannot be attacked, rounded or trained: what a way brings back is "
                "compared with its EM behind the own prefix. It is made of the model itself, and "
                "the depth against it can be larger than against a model that never saw the text."
            )
        return tuple(said)

    @property
    def harm_report(self) -> EditReport:
        """What the edit did to controls, other recitations and held-out text."""
        return EditReport(
            samples=self.harm,
            n_samples=self.n_samples,
            provenance=self.provenance,
            groups=self.groups,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per measure of the targets.

        Columns `measure, units, unedited, edited, ci_low, ci_high, reference, n, n_groups`; the
        interval (95 % over independent groups) is that of the edited model.
        """
        import pandas as pd

        groups = self.groups["targets"]
        rows: list[dict[str, Any]] = []
        ratios = {"depth": (0.0, self.depth, 1.0), "remembered": (1.0, self.remembered, 0.0)}
        for name, (unedited, (value, low, high), reference) in ratios.items():
            rows.append(_row(name, [unedited, value, reference], low, high))
        measures: dict[str, Tensor] = dict(self.samples)
        measures["bits"] = self.bits.float()
        measures["extraction"] = torch.from_numpy(
            extraction_probability(-(self.bits * math.log(2)).numpy(), self.n_samples)
        ).float()
        for name, samples in measures.items():
            if name == "kl_unedited":
                continue
            low, high = bootstrap_interval(samples[1].float(), groups).tolist()
            shown = "kl_to_reference" if name == "kl" else name  # the table of harm has a `kl` too
            rows.append(_row(shown, [self._mean(arm) for arm in samples], low, high))
        frame = pd.DataFrame(rows)
        return frame.assign(n=len(groups), n_groups=len(groups.unique()))

    def relearning_frame(self) -> pd.DataFrame:
        """Columns `trained_on, set, step, em, em_low, em_high`; `set` is the arm."""
        import pandas as pd

        rows = []
        for text, curve in self.relearning.items():
            for arm, by_step in zip(ARMS, curve, strict=False):
                bounds = bootstrap_interval(by_step.float().T, self.groups["targets"])
                rows += [
                    {
                        "trained_on": text,
                        "set": arm,
                        "step": step,
                        "em": self._mean(em),
                        "em_low": float(bounds[0, step]),
                        "em_high": float(bounds[1, step]),
                    }
                    for step, em in enumerate(by_step)
                ]
        return pd.DataFrame(rows)

    def layers_frame(self) -> pd.DataFrame | None:
        """Columns `layer, depth`: the share of the reference's rise of the NLL; None without."""
        import pandas as pd

        if self.layer_nll is None:
            return None
        unedited, edited, reference = self.layer_nll
        rows = []
        for layer in range(len(edited)):
            rise = edited[layer] - unedited[layer], reference[layer] - unedited[layer]
            value, low, high = self._ratio(*rise)
            rows.append({"layer": layer, "depth": value, "ci_low": low, "ci_high": high})
        return pd.DataFrame(rows)

    @property
    def paragraphs(self) -> Paragraphs:
        """The targets."""
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names), bos=self.bos)

    def figure(self) -> Any:
        """EM while the model is trained, edited beside unedited model and twin (plotly)."""
        from memcircuits.display import figures

        frame = self.relearning_frame()
        first = frame["trained_on"].iloc[0]
        return figures.curves(
            frame[frame["trained_on"] == first],
            "step",
            {"em": "exact match (tokens)"},
            title=f"Training on {first}",
            x_label="training step",
        )

    def __str__(self) -> str:
        value, low, high = self.depth
        bounds = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        em = self._mean(self.samples["em_attacked"][1])
        back = f"; brought back by {', '.join(self.ways_back)}" if self.ways_back else ""
        return (
            f"{self.verdict}: depth {value:.2f}{bounds} against the {self.reference}, "
            f"{em:.1f} tokens from the best of {self.n_attacks} prefixes{back}"
        )


def _row(name: str, arms: list[float], low: float, high: float) -> dict[str, Any]:
    unedited, edited, reference = arms
    return {
        "measure": name,
        "units": UNITS.get(name, "tokens"),
        "unedited": unedited,
        "edited": edited,
        "ci_low": low,
        "ci_high": high,
        "reference": reference,
    }
