"""The result of `find_memorization_components`: what the recitation needs, best first.

The score of a component is its causal evidence: how much more its ablation raises the NLL of
memorized paragraphs than that of controls. Gradients and attention stand beside it, one column
each. The interval comes from resampling paragraphs and the p-value from permuting their labels. A
component is *significant* if its q-value, the p-value after Benjamini-Hochberg correction over all
components of its unit, is below 0.05; if none is, the summary says so. Paragraphs that depend on
each other count as one (`memcircuits.data.groups`), and the summary says how many independent
groups there are.

All numbers are grids [layer, column] (`memcircuits.evidence.component_grid`). In a ranking of heads
alone a column is a head, and in any ranking with heads they come first, so that `ranking.score[3,
5]` and `ranking.score[mc.Head(3, 5)]` are those of L3H5.

`memcircuits.evidence.find_components` computes it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.errors import InputError, at_least
from memcircuits.base.heads import Head
from memcircuits.base.io import write_atomically
from memcircuits.base.statistics import benjamini_hochberg
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.component_grid import ComponentGrid, RankedUnit
from memcircuits.evidence.component_scores import SCORE_UNITS
from memcircuits.evidence.levels import levels_frame
from memcircuits.evidence.ranking_summary import summary, table
from memcircuits.models.adapter import Model
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap, largest

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.unigrams import UnigramTable
    from memcircuits.display.pages import AttentionView
    from memcircuits.evidence.direct_writes import Writes

SIGNIFICANCE = 0.05
"""Components with a smaller q-value are significant."""


@dataclass(frozen=True)
class Ranking(Result, kind="ranking"):
    """Components, ranked by how much more memorized paragraphs need them than controls do.

    Attributes:
        score: memorized minus control, [layer, column]: the effect of ablation, nats/token, or its
            share of the mean effect (`provenance.options["score"]`).
        ci: 95 % bootstrap interval over independent groups of paragraphs, [bound, layer, column].
        p_value: one-sided permutation of the groups' labels, [layer, column].
        evidence: name -> [layer, column].
        memorized_ids: the memorized paragraphs measured, [paragraph, pos].
        control_ids: the controls measured, [paragraph, pos].
        names: set (`memorized`, `control`) -> names of its paragraphs.
        n_prefix: number of prefix tokens.
        layer_share: set -> share of the lower half of the layers in the gradient.
        layer_gradients: set -> gradient sum per layer.
        counts: how many paragraphs were given, memorized, controls, measured, not finite, and how
            many independent groups were measured; how many permutations were drawn.
        notes: what the reader must know.
        provenance: where the numbers come from.
        bos: ids of the tokens in front of every paragraph.
        units: what was ranked (`memcircuits.evidence.component_grid`).
        n_heads: heads of a layer; 0 in rankings of heads alone from earlier versions.
        levels: level -> its quantities (`memcircuits.evidence.levels`).
        ranks: best and worst possible rank of those ablated, [bound, layer, column], or None.
        model: the model, kept for `attention` and `to_html`; not saved.
        unigrams: the table that defined rarity, kept to colour tokens; not saved.
        seconds: how long it took; not saved, so that equal rankings are equal files.
        samples: set -> ablation effect on each independent group of paragraphs, nats/token,
            [group, layer, column], without neurons; empty in rankings saved by earlier versions.
    """

    score: Float[Tensor, "layer column"]
    ci: Float[Tensor, "bound layer column"]
    p_value: Float[Tensor, "layer column"]
    evidence: Mapping[str, Float[Tensor, "layer column"]]
    memorized_ids: Int[Tensor, "paragraph pos"]
    control_ids: Int[Tensor, "paragraph pos"]
    names: Mapping[str, tuple[str, ...]]
    n_prefix: int
    layer_share: Mapping[str, float]
    layer_gradients: Mapping[str, Float[Tensor, " layer"]]
    counts: Mapping[str, int]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    bos: tuple[int, ...] = ()
    units: tuple[RankedUnit, ...] = ("head",)
    n_heads: int = 0
    levels: Mapping[str, Float[Tensor, " quantity"]] = field(default_factory=dict)
    ranks: Float[Tensor, "bound layer column"] | None = None
    model: Model | None = field(default=None, repr=False, compare=False, metadata={"saved": False})
    unigrams: UnigramTable | None = field(
        default=None, repr=False, compare=False, metadata={"saved": False}
    )
    seconds: float | None = field(default=None, compare=False, metadata={"saved": False})
    samples: Mapping[str, Float[Tensor, "group layer column"]] = field(default_factory=dict)

    @property
    def grid(self) -> ComponentGrid:
        """Which component each column is."""
        n_layers, width = self.score.shape
        n_heads = self.n_heads or width
        grid = ComponentGrid(self.units, n_layers, n_heads)
        n_neurons = width - grid.width if "neuron" in self.units else 0
        return grid._replace(n_neurons=n_neurons)

    @property
    def q_value(self) -> Float[Tensor, "layer column"]:
        """p-values after Benjamini-Hochberg correction over all components of the same unit."""
        grid, q_value = self.grid, torch.ones_like(self.p_value)
        for unit in self.units:
            columns = grid.columns(unit)
            q_value[:, columns] = benjamini_hochberg(self.p_value[:, columns])
        return q_value

    @property
    def significant(self) -> Bool[Tensor, "layer column"]:
        """Components with q < 0.05, [layer, column]."""
        return self.q_value < SIGNIFICANCE

    @property
    def score_units(self) -> str:
        """Units of the score."""
        return SCORE_UNITS[self.provenance.options.get("score", "effect")]

    @property
    def memorized(self) -> Paragraphs:
        """The memorized paragraphs that were measured."""
        names = tuple(self.names["memorized"])
        return Paragraphs(self.memorized_ids, self.n_prefix, names, bos=self.bos)

    @property
    def control(self) -> Paragraphs:
        """The controls that were measured."""
        names = tuple(self.names["control"])
        return Paragraphs(self.control_ids, self.n_prefix, names, bos=self.bos)

    @property
    def scores(self) -> ScoreMap:
        """The score of all heads as a `ScoreMap`.

        Raises:
            InputError: if heads were not ranked.
        """
        if "head" not in self.units:
            raise InputError("units", repr(self.units), "no heads were ranked; rank them too")
        of_heads = self.score[:, self.grid.columns("head")].contiguous()
        return ScoreMap("memorization score", self.score_units, of_heads, self.provenance)

    def top(self, k: int = 10) -> list[Head]:
        """The `k` highest-ranked heads."""
        at_least("k", k, 1)
        return self.scores.top(k)

    def top_components(self, k: int = 10) -> list[Component]:
        """The `k` highest-ranked components; of neurons only those that were ablated."""
        at_least("k", k, 1)
        return [self.grid.component(*place) for place in self._places()[:k]]

    def _places(self) -> list[Head]:
        """Layer and column of every component that the table lists, best first."""
        listed = self.score.clone()
        neurons = self.grid.columns("neuron")
        verified = self.evidence["verified"].bool()[:, neurons]
        listed[:, neurons] = listed[:, neurons].where(verified, torch.nan)
        return largest(listed, listed.numel())

    def to_frame(self) -> pd.DataFrame:
        """One row per component, best first; of neurons only those that were ablated.

        Columns `unit, layer, head` (empty for other units), `neuron` where neurons were ranked,
        `rank, score, ci_low, ci_high, rank_low, rank_high, p_value, q_value, significant` and one
        per kind of evidence (ranks: `memcircuits.base.simultaneous`).
        """
        places = self._places()
        ranks = torch.full_like(self.ci, torch.nan) if self.ranks is None else self.ranks
        names = ("ci_low", "ci_high", "rank_low", "rank_high")
        numbers = {
            "score": self.score,
            **dict(zip(names, (*self.ci, *ranks), strict=True)),
            "p_value": self.p_value,
            "q_value": self.q_value,
            "significant": self.significant,
            **self.evidence,
        }
        components = [self.grid.component(*place) for place in places]
        return table(components, places, numbers, neurons="neuron" in self.units)

    def levels_frame(self) -> pd.DataFrame:
        """How much of the effect lies in heads and in MLPs (`memcircuits.evidence.levels`).

        Columns `level` (`head`, `mlp`, `all` of both, `neuron` for those that were ablated), `sum`
        of single effects, `joint` effect and their difference `interaction`, nats/token; the
        `share` of the sum and its 95 % interval. Empty where heads were not ranked.
        """
        return levels_frame(self.levels)

    def figure(self) -> Any:
        """The score of heads, MLPs and layers, a row per layer (plotly)."""
        from memcircuits.display import figures

        names = self.grid.map_names()
        return figures.heatmap(
            self.score[:, : len(names)],
            title="Memorization score: loss without the component, memorized minus control",
            name="score",
            units=self.score_units,
            marks=self.significant[:, : len(names)],
            col_label="head" if self.units == ("head",) else "head, or part of the layer",
            col_names=names,
        )

    def writes(
        self,
        paragraphs: ParagraphsLike | None = None,
        *,
        components: int = 5,
        k: int = 5,
        model: Model | None = None,
    ) -> Writes:
        """What the best heads, MLPs and neurons write, and what heads read when they do.

        See `memcircuits.evidence.direct_writes.writes`.

        Args:
            paragraphs: whose continuations are looked at, by default the memorized ones.
            components: number of components, the best ones; layers are passed over.
            k: number of tokens named for each.
            model: needed by a loaded ranking, which has none.

        Raises:
            InputError: if there is no model, or its blocks or logits are not sums over components.
        """
        from memcircuits.evidence.direct_writes import writes

        at_least("components", components, 1)
        best = [c for c in self.top_components(self.score.numel()) if c.unit != "layer"]
        paragraphs = self.memorized if paragraphs is None else paragraphs
        return writes(self._model_or(model), paragraphs, best[:components], k=k, progress=False)

    def attention(
        self,
        paragraph: ParagraphsLike,
        *,
        heads: int = 4,
        compare: ParagraphsLike | None = None,
        model: Model | None = None,
    ) -> AttentionView:
        """Attention of the best heads on one paragraph, see `memcircuits.attention_view`.

        Args:
            paragraph: one paragraph, such as `ranking.memorized[0]`.
            heads: number of heads shown, the best ones.
            compare: a second paragraph shown beside it, such as the perturbed one.
            model: needed by a loaded ranking, which has none.

        Raises:
            InputError: if there is no model.
        """
        from memcircuits.evidence.attention_view import attention_view

        return attention_view(
            self._model_or(model),
            paragraph,
            heads=self.top(min(heads, self.scores.values.numel())),
            compare=compare,
            unigrams=self.unigrams,
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        heads: int = 6,
        triggers: int = 3,
        controls: pd.DataFrame | None = None,
        model: Model | None = None,
        progress: bool = True,
    ) -> Path:
        """Write the self-contained report, see `memcircuits.report.ranking_page`.

        Args:
            path: the HTML file.
            heads: number of heads whose attention is shown, the best ones.
            triggers: number of paragraphs whose trigger tokens are shown; each takes a forward pass
                for every prefix token. 0 leaves the section out.
            controls: the table of `memcircuits.evidence.control_choices.compare_controls`, if any.
            model: needed by a loaded ranking, which has none.
            progress: show a bar on stderr.

        Raises:
            InputError: if there is no model, or its weights are not those of the ranking.
        """
        from memcircuits.report.ranking_page import ranking_page

        model = self._model_or(model)
        page = ranking_page(
            self, model, heads=heads, triggers=triggers, controls=controls, progress=progress
        )
        return page.save(Path(path))

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the table, counts and provenance as JSON."""
        data = {
            "schema": "memcircuits.ranking/1",
            "summary": self.summary(),
            "counts": dict(self.counts),
            "layer_share": dict(self.layer_share),
            "notes": list(self.notes),
            "levels": json.loads(self.levels_frame().to_json(orient="records")),
            "heads": json.loads(self.to_frame().to_json(orient="records", double_precision=10)),
            "provenance": dataclasses.asdict(self.provenance),
        }
        return write_atomically(path, json.dumps(data, indent=1) + "\n")

    def summary(self) -> str:
        """Which components are significant, and how much lies outside heads."""
        order = self.top_components(self.score.numel())
        return summary(
            self.grid,
            order,
            self.significant,
            self.counts,
            self.levels,
            self.score,
            self.evidence["ablation_control"],
        )

    def _model_or(self, model: Model | None) -> Model:
        """The model given, or else the one that the ranking was computed from."""
        model = self.model if model is None else model
        if model is None:
            raise InputError("model", "None", "a loaded ranking has no model: pass model=")
        return model

    def __str__(self) -> str:
        return self.summary()
