"""The result of `find_memorization_heads`: all heads, ranked by how much the recitation needs them.

The score of a head is its causal evidence: how much more its ablation raises the NLL of memorized
paragraphs than that of controls. Gradients and attention stand beside it, one column each. The
interval comes from resampling paragraphs and the p-value from permuting their labels. A head is
*significant* if its q-value, the p-value after Benjamini-Hochberg correction over all heads, is
below 0.05; if no head is, the summary says so. Paragraphs that depend on each other count as one
(`memcircuits.data.groups`), and the summary says how many independent groups there are.

`memcircuits.evidence.find_heads` computes it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.heads import Head
from memcircuits.base.io import write_atomically
from memcircuits.base.statistics import benjamini_hochberg
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.models.adapter import Model
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.unigrams import UnigramTable
    from memcircuits.display.pages import AttentionView

SIGNIFICANCE = 0.05
"""Heads with a smaller q-value are significant."""

FEW_PARAGRAPHS = 20
"""Fewer are hardly enough for any head to reach significance."""

NAMED_HEADS = 5
"""Maximum number of heads that the summary names."""


@dataclass(frozen=True)
class Ranking(Result, kind="ranking"):
    """All heads, ranked by how much more memorized paragraphs need them than controls do.

    Attributes:
        score: memorized minus control ablation effect, nats/token, [layer, head].
        ci: 95 % bootstrap interval over independent groups of paragraphs, [bound, layer, head].
        p_value: one-sided permutation of the groups' labels, [layer, head].
        evidence: column -> [layer, head].
        memorized_ids: the memorized paragraphs measured, [paragraph, pos].
        control_ids: the controls measured, [paragraph, pos].
        names: set (`memorized`, `control`) -> names of its paragraphs.
        n_prefix: number of prefix tokens.
        layer_share: set -> share of the lower half of the layers in the gradient.
        layer_gradients: set -> gradient sum per layer.
        counts: how many paragraphs were given, memorized, controls, measured, not finite, and how
            many independent groups were measured.
        notes: what the reader must know.
        provenance: where the numbers come from.
        bos: ids of the tokens in front of every paragraph.
        model: the model, kept for `attention` and `to_html`; not saved.
        unigrams: the table that defined rarity, kept to colour tokens; not saved.
        seconds: how long it took; not saved, so that equal rankings are equal files.
        samples: set -> ablation effect on each independent group of paragraphs, nats/token,
            [group, layer, head]; empty in rankings saved by earlier versions.
    """

    score: Float[Tensor, "layer head"]
    ci: Float[Tensor, "bound layer head"]
    p_value: Float[Tensor, "layer head"]
    evidence: Mapping[str, Float[Tensor, "layer head"]]
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
    model: Model | None = field(default=None, repr=False, compare=False, metadata={"saved": False})
    unigrams: UnigramTable | None = field(
        default=None, repr=False, compare=False, metadata={"saved": False}
    )
    seconds: float | None = field(default=None, compare=False, metadata={"saved": False})
    samples: Mapping[str, Float[Tensor, "group layer head"]] = field(default_factory=dict)

    @property
    def q_value(self) -> Float[Tensor, "layer head"]:
        """p-values after Benjamini-Hochberg correction over all heads."""
        return benjamini_hochberg(self.p_value)

    @property
    def significant(self) -> Bool[Tensor, "layer head"]:
        """Heads with q < 0.05, [layer, head]."""
        return self.q_value < SIGNIFICANCE

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
        """The score as a `ScoreMap`."""
        return ScoreMap("memorization score", "nats/token", self.score, self.provenance)

    def top(self, k: int = 10) -> list[Head]:
        """The `k` highest-ranked heads."""
        at_least("k", k, 1)
        return self.scores.top(k)

    def to_frame(self) -> pd.DataFrame:
        """One row per head, best first.

        Columns `layer, head, rank, score, ci_low, ci_high, p_value, q_value, significant` and one
        per kind of evidence.
        """
        import numpy as np

        frame = self.scores.to_frame().rename(columns={"value": "score"})
        columns = {
            "ci_low": self.ci[0],
            "ci_high": self.ci[1],
            "p_value": self.p_value,
            "q_value": self.q_value,
            "significant": self.significant,
            **self.evidence,
        }
        for name, values in columns.items():
            frame[name] = values.flatten().numpy()
        frame = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
        frame.insert(2, "rank", np.arange(1, len(frame) + 1))
        return frame

    def figure(self) -> Any:
        """A layer x head heatmap of the score (plotly)."""
        from memcircuits.display import figures

        return figures.heatmap(
            self.score,
            title="Memorization score: loss without the head, memorized minus control",
            name="score",
            units="nats/token",
            marks=self.significant,
        )

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
            heads=self.top(min(heads, self.score.numel())),
            compare=compare,
            unigrams=self.unigrams,
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        heads: int = 6,
        triggers: int = 3,
        model: Model | None = None,
        progress: bool = True,
    ) -> Path:
        """Write the self-contained report, see `memcircuits.report.ranking_page`.

        Args:
            path: the HTML file.
            heads: number of heads whose attention is shown, the best ones.
            triggers: number of paragraphs whose trigger tokens are shown; each takes a forward pass
                for every prefix token. 0 leaves the section out.
            model: needed by a loaded ranking, which has none.
            progress: show a bar on stderr.

        Raises:
            InputError: if there is no model, or its weights are not those of the ranking.
        """
        from memcircuits.report.ranking_page import ranking_page

        page = ranking_page(
            self, self._model_or(model), heads=heads, triggers=triggers, progress=progress
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
            "heads": json.loads(self.to_frame().to_json(orient="records", double_precision=10)),
            "provenance": dataclasses.asdict(self.provenance),
        }
        return write_atomically(path, json.dumps(data, indent=1) + "\n")

    def summary(self) -> str:
        """One sentence: which heads are significant."""
        n_significant, n_heads = int(self.significant.sum()), self.score.numel()
        measured, controls = self.counts["measured"], self.counts["measured_control"]
        n_controls = "as many" if controls == measured else str(controls)
        sets = f"{measured} memorized paragraphs against {n_controls} controls"
        # Rankings saved by earlier versions took every paragraph as independent.
        groups = self.counts.get("groups", measured)
        groups_control = self.counts.get("groups_control", controls)
        if (groups, groups_control) != (measured, controls):
            sets += f", in {groups} and {groups_control} independent groups"
        if not n_significant:
            text = f"No head is significant ({sets}, q < {SIGNIFICANCE})."
            if groups < FEW_PARAGRAPHS:
                text += " So few paragraphs can hardly reach that: read the order and intervals."
            return text
        ranked = [head for head in self.scores.top(n_heads) if self.significant[head]]
        names = ", ".join(str(head) for head in ranked[:NAMED_HEADS])
        if n_significant > NAMED_HEADS:
            names += f" and {n_significant - NAMED_HEADS} more"
        return (
            f"{n_significant} of {n_heads} heads are significant "
            f"({sets}, q < {SIGNIFICANCE}): {names}."
        )

    def _model_or(self, model: Model | None) -> Model:
        """The model given, or else the one that the ranking was computed from."""
        model = self.model if model is None else model
        if model is None:
            raise InputError("model", "None", "a loaded ranking has no model: pass model=")
        return model

    def __str__(self) -> str:
        return self.summary()
