"""What `formation` returns: measures of the same paragraphs at every checkpoint of a training."""

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
    bootstrap_means,
    count_groups,
    group_means,
    interval,
)
from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Formation(Result, kind="formation"):
    """Measures of the same paragraphs at every checkpoint.

    Attributes:
        steps: the steps, ascending.
        names: the paragraphs' names.
        metadata: the paragraphs' further columns.
        em: tokens recited, [step, paragraph].
        nll: nats/token, [step, paragraph].
        twin_nll: of the twin, [step, paragraph]; no steps without one.
        control_nll: of the controls, [step, control]; no steps without any.
        measured: rows of the paragraphs whose heads were measured.
        ablation: rise of their NLL without a head, nats/token, [step, measured, layer, head].
        necessity: rise of their NLL with the twin's head; no steps without a twin.
        provenance: where the numbers come from, with the last model; `options` names all models.
        groups: `given` and `control` -> number of each paragraph's group
            (`Paragraphs.groups`); means and intervals count a group once.
        notes: what the reader must know.
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    metadata: Mapping[str, tuple[Any, ...]]
    em: Int[Tensor, "step paragraph"]
    nll: Float[Tensor, "step paragraph"]
    twin_nll: Float[Tensor, "twin_step paragraph"]
    control_nll: Float[Tensor, "control_step control"]
    measured: tuple[int, ...]
    ablation: Float[Tensor, "step measured layer head"]
    necessity: Float[Tensor, "twin_step measured layer head"]
    provenance: Provenance
    groups: Mapping[str, Int[Tensor, " paragraph"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def remembered(self) -> Float[Tensor, "twin_step paragraph"]:
        """Bits per token that the model knows and the twin does not."""
        nll = self.nll if len(self.twin_nll) else self.nll[:0]
        return (self.twin_nll - nll) / math.log(2)

    @property
    def dose_column(self) -> str | None:
        """The column of the metadata that says how often a paragraph was seen, if there is one."""
        return next((name for name in REPETITION_COLUMNS if name in self.metadata), None)

    def _sets(self, by: str | None) -> list[tuple[Any, list[int]]]:
        """The rows of each value of a column; all in one set without a column."""
        column = by or self.dose_column
        if column is None:
            return [("all", list(range(len(self.names))))]
        if column not in self.metadata:
            known = ", ".join(self.metadata) or "none"
            raise InputError("by", repr(column), f"the paragraphs have {known}")
        values = self.metadata[column]
        ordered = sorted(set(values), key=lambda v: (str(type(v)), v))
        return [(v, [i for i, other in enumerate(values) if other == v]) for v in ordered]

    def to_frame(self, by: str | None = None, *, seed: int = 0) -> pd.DataFrame:
        """Means of every step and set of paragraphs.

        Columns `step`, `set`, `n`, `n_groups` (independent ones), `em` (tokens), `nll`
        (nats/token), and where they were measured `remembered` (bits/token) and `effect`
        (nats/token, difference in differences against the controls and the first step), each with
        its 95 % interval over independent groups of paragraphs (`_low`, `_high`; NaN for a single
        group).

        Args:
            by: column of the metadata that makes the sets; by default, how often the paragraphs
                were seen, or all together.
            seed: seed of the bootstrap.

        Raises:
            InputError: if the paragraphs have no such column.
        """
        import pandas as pd

        rows = []
        for value, members in self._sets(by):
            groups = self.groups["given"][members] if self.groups else None
            for i, step in enumerate(self.steps):
                row: dict[str, Any] = {"step": step, "set": value, "n": len(members)}
                row["n_groups"] = len(members) if groups is None else count_groups(groups)
                row["em"] = float(group_means(self.em[i, members].float(), groups).mean())
                row |= _mean("nll", _finite_means(self.nll[i, members], groups), None, seed)
                if len(self.twin_nll):
                    remembered = _finite_means(self.remembered[i, members], groups)
                    row |= _mean("remembered", remembered, None, seed)
                if len(self.control_nll):
                    fallen = self.nll[0, members] - self.nll[i, members]
                    control = self.control_nll[0] - self.control_nll[i]
                    control = _finite_means(control, self.groups.get("control"))
                    row |= _mean("effect", _finite_means(fallen, groups), control, seed)
                rows.append(row)
        return pd.DataFrame(rows)

    def head_frame(self, by: str | None = None) -> pd.DataFrame:
        """Mean ablation and necessity of every head, step and group of the measured paragraphs.

        Columns `step, set, n, layer, head, ablation` and, with a twin, `necessity` (nats/token).

        Args:
            by: as in `to_frame`.
        """
        import pandas as pd

        rows = []
        for value, members in self._sets(by):
            chosen = [column for column, row in enumerate(self.measured) if row in set(members)]
            for i, step in enumerate(self.steps if chosen else ()):
                maps = {"ablation": self.ablation[i, chosen].nanmean(0)}
                if len(self.necessity):
                    maps["necessity"] = self.necessity[i, chosen].nanmean(0)
                n_layers, n_heads = maps["ablation"].shape
                for layer in range(n_layers):
                    for head in range(n_heads):
                        row = {"step": step, "set": value, "n": len(chosen)}
                        values = {name: float(grid[layer, head]) for name, grid in maps.items()}
                        rows.append(row | {"layer": layer, "head": head} | values)
        return pd.DataFrame(rows)

    def agreement(self) -> pd.DataFrame:
        """Rank correlations over heads at every step, of means over the measured paragraphs.

        Columns `step`, `ranking_last` (ablation with that of the last step) and, with a twin,
        `truth_last` (necessity with that of the last step) and `ranking_truth` (ablation with
        necessity at the same step); NaN where one is the same for all heads.
        """
        import pandas as pd

        rows = []
        for i, step in enumerate(self.steps if self.measured else ()):
            row: dict[str, Any] = {"step": step}
            ranking = self.ablation.nanmean(1).flatten(1)
            row["ranking_last"] = _spearman(ranking[i], ranking[-1])
            if len(self.necessity):
                truth = self.necessity.nanmean(1).flatten(1)
                row["truth_last"] = _spearman(truth[i], truth[-1])
                row["ranking_truth"] = _spearman(ranking[i], truth[i])
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self, by: str | None = None) -> Any:
        """EM, remembered bits and effect against steps, one line for each group (plotly)."""
        from memcircuits.display import figures

        panels = {
            "em": "exact match (tokens)",
            "remembered": "remembered (bits/token)",
            "effect": "effect (nats/token)",
        }
        frame = self.to_frame(by)
        return figures.curves(frame, "step", panels, title=str(self), x_label="step of training")

    def __str__(self) -> str:
        full = (self.em == self.em.max()).sum(1).tolist() if self.em.numel() else []
        first, last = self.em[0].float().mean(), self.em[-1].float().mean()
        return (
            f"{len(self.names)} paragraphs at {len(full)} checkpoints: "
            f"mean EM {float(first):.1f} at step {self.steps[0]}, {float(last):.1f} at step "
            f"{self.steps[-1]}"
        )


def _mean(name: str, values: Tensor, control: Tensor | None, seed: int) -> dict[str, float]:
    """Mean of groups, minus that of groups of controls if there are any, with its interval."""
    other = torch.zeros(2) if control is None else control
    low = high = math.nan
    if len(values) > 1 and len(other) > 1:
        generator = torch.Generator().manual_seed(seed)
        draws = bootstrap_means(values, DRAWS, generator)
        bounds = interval(draws - bootstrap_means(other, DRAWS, generator))
        low, high = float(bounds[0]), float(bounds[1])
    return {name: float(values.mean() - other.mean()), f"{name}_low": low, f"{name}_high": high}


def _finite_means(
    values: Float[Tensor, " paragraph"], groups: Int[Tensor, " paragraph"] | None
) -> Float[Tensor, " group"]:
    """Means of the groups over their paragraphs of finite numbers."""
    finite = values.isfinite()
    return group_means(values[finite], None if groups is None else groups[finite])


def _spearman(first: Tensor, second: Tensor) -> float:
    from scipy.stats import spearmanr

    if (first == first[0]).all() or (second == second[0]).all():
        return math.nan
    return float(spearmanr(first.double().numpy(), second.double().numpy()).statistic)
