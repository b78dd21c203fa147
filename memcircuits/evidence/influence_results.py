"""What `influence` measured: a table of trained and tested rows, teachers, rank correlations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import bootstrap_interval, group_means
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block


@dataclass(frozen=True)
class Influence(Result, kind="influence"):
    """What one gradient step on each trained row does to every tested one.

    Attributes:
        values: change of the log-probability of a tested row's continuation, nats,
            [trained, tested]. Within paragraphs: of one token, the mean over paragraphs.
        gradient_norms: length of each trained row's gradient in the weights that change, nats per
            unit of weight, [trained]; the step is `eta` times as long.
        eta: size of the step; a negative one unlearns.
        trained: names of the trained rows, or of the pieces of the prefix.
        tested: names of the tested rows, or positions of continuation tokens.
        provenance: where the numbers come from.
        samples: within paragraphs, `influence` -> [paragraph, trained, tested].
        groups: `trained` and `tested` -> number of each row's group of dependent rows
            (`Paragraphs.groups`), the same numbers in both; empty within paragraphs.
        notes: what the reader must know.
    """

    values: Float[Tensor, "trained tested"]
    gradient_norms: Float[Tensor, " trained"]
    eta: float
    trained: tuple[str, ...]
    tested: tuple[str, ...]
    provenance: Provenance
    samples: dict[str, Float[Tensor, "paragraph trained tested"]] = field(default_factory=dict)
    groups: Mapping[str, Int[Tensor, " row"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if tuple(self.values.shape) != (len(self.trained), len(self.tested)):
            raise InputError("values", tuple(self.values.shape), "give [trained, tested]")

    @property
    def per_step_length(self) -> Float[Tensor, "trained tested"]:
        """Influence per unit length of the step, nats per unit of weight: rows compare."""
        return self.values / (abs(self.eta) * self.gradient_norms[:, None])

    def teachers(self) -> pd.DataFrame:
        """For each tested row, the trained row that raises its log-probability most.

        Trained rows are compared per length of their step. A tested row that is recited with
        certainty hardly changes by any step, and a text that raises all recitations a little may
        then pass its own teacher.

        Returns:
            Columns `tested, teacher, influence` (nats), `per_step_length`, `next` (the second best
            teacher) and `own_rank`: the rank, from 1, of the trained row of the same name; empty
            where there is none.
        """
        import pandas as pd

        score = self.per_step_length * (1.0 if self.eta > 0 else -1.0)
        order = score.argsort(dim=0, descending=True)
        rows = []
        for j, name in enumerate(self.tested):
            best = int(order[0, j])
            own = self.trained.index(name) if name in self.trained else None
            rows.append(
                {
                    "tested": name,
                    "teacher": self.trained[best],
                    "influence": float(self.values[best, j]),
                    "per_step_length": float(self.per_step_length[best, j]),
                    "next": self.trained[int(order[1, j])] if len(order) > 1 else None,
                    "own_rank": None if own is None else order[:, j].tolist().index(own) + 1,
                }
            )
        return pd.DataFrame(rows).astype({"own_rank": "Int64"})

    def rank_correlation(
        self, harm: Float[Tensor, "trained tested"], *, seed: int = 0
    ) -> tuple[float, float, float]:
        """Does the influence of a row predict something else that was measured of each pair?

        Spearman's rank correlation over the tested rows, for each trained row by itself and without
        the tested rows of the same name or group (copies of it teach themselves); then the mean
        over groups of trained rows.

        Args:
            harm: what was measured, [trained, tested]; such as the change of log-probability of
                other recitations after each was unlearned by `unlearn`.
            seed: of the bootstrap over groups of trained rows.

        Returns:
            The mean and the bounds of its 95 % interval over independent groups of trained rows.
            Rows whose numbers are constant are left out; NaN if all are.

        Raises:
            InputError: if `harm` has another shape.
        """
        from scipy.stats import spearmanr

        if harm.shape != self.values.shape:
            shape = tuple(self.values.shape)
            raise InputError("harm", tuple(harm.shape), f"give [trained, tested], {shape}")
        correlations, rows = [], []
        for i in range(len(self.trained)):
            others = (~self._is_same(i)).nonzero().flatten()
            influence, measured = self.values[i, others], harm[i, others]
            if len(others) > 1 and influence.unique().numel() > 1 < measured.unique().numel():
                ranks = spearmanr(influence.double().numpy(), measured.double().numpy())
                correlations.append(float(ranks.statistic))
                rows.append(i)
        if not correlations:
            return (float("nan"),) * 3
        groups = self.groups["trained"][rows] if self.groups else None
        samples = group_means(torch.tensor(correlations), groups)
        low, high = bootstrap_interval(samples, seed=seed).tolist()
        return float(samples.mean()), low, high

    def _is_same(self, row: int) -> Bool[Tensor, " tested"]:
        """Whether each tested row has the name or the group of a trained one."""
        same = torch.tensor([name == self.trained[row] for name in self.tested])
        if self.groups:
            same |= self.groups["tested"] == self.groups["trained"][row]
        return same

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: columns `trained, tested, influence, per_step_length`."""
        import pandas as pd

        n_trained, n_tested = self.values.shape
        return pd.DataFrame(
            {
                "trained": [name for name in self.trained for _ in range(n_tested)],
                "tested": list(self.tested) * n_trained,
                "influence": self.values.flatten().double().numpy(),
                "per_step_length": self.per_step_length.flatten().double().numpy(),
            }
        )

    def figure(self) -> Any:
        """A heat map of trained rows against tested ones (plotly)."""
        from memcircuits.display import figures

        return figures.heatmap(self.values, title=str(self), diverging=True, **self._axes)

    def block(self) -> Block:
        """The same as a block of a page."""
        from memcircuits.display.pages import Heatmap

        return Heatmap(
            self.values,
            title="Influence",
            note="Rows were trained on by one gradient step, columns tested: orange where the step "
            "made the text more likely.",
            diverging=True,
            **self._axes,
        )

    @property
    def _axes(self) -> dict[str, Any]:
        return {
            "name": "change of log p",
            "units": "nats",
            "row_label": "trained",
            "col_label": "tested",
            "row_names": self.trained,
            "col_names": self.tested,
        }

    def __str__(self) -> str:
        kind = "prefix pieces on continuation tokens" if self.samples else "rows"
        return (
            f"influence of {len(self.trained)} trained on {len(self.tested)} tested ({kind}), "
            f"step {self.eta:g}"
        )
