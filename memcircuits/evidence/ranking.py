"""Which heads does the recitation depend on? The argument of the paper, with controls and intervals.

Given paragraphs, the model says by itself which it recites (EM, `memcircuits.measure.scanning`). For each
head, three kinds of evidence are gathered, on memorized paragraphs and on controls that are not:

1. *Causal* (`memcircuits.evidence.ablation`): how much worse does the model predict the memorized
   continuations without the head, and is that more than for controls? Nats/token and EM.
2. *Weights* (`memcircuits.evidence.gradients.parameters`): how large are the gradients of the loss on memorized
   paragraphs in the head's four matrices (equation 2)?
3. *Attention* (`memcircuits.evidence.rare_tokens`): does it attend to rare prefix tokens (section 5.4)?

The score is the causal one, memorized minus control, because only that one says what the recitation
*needs*; the others stand beside it. Paragraphs are resampled for the interval and their labels
permuted for the p-value; a head is significant if its q-value, the p-value after
Benjamini-Hochberg correction over all heads, is below 0.05; if no head is, the ranking says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.heads import Head
from memcircuits.core.io import write_atomically
from memcircuits.core.statistics import benjamini_hochberg
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap

if TYPE_CHECKING:
    import pandas as pd


SIGNIFICANCE = 0.05


FEW = 20  # fewer paragraphs are too few for any head to reach significance


@dataclass(frozen=True)
class Ranking(Result, kind="ranking"):
    """All heads, ranked by how much more memorized paragraphs need them than controls do.

    Attributes:
        score: memorized minus control ablation effect, nats/token, [layer, head].
        ci: 95 % bootstrap interval over paragraphs, [bound, layer, head].
        p_value: one-sided label permutation, [layer, head].
        evidence: column -> [layer, head].
        memorized_ids: the memorized paragraphs measured, [paragraph, pos].
        control_ids: the controls measured, [paragraph, pos].
        names: names of both.
        n_prefix: tokens of the prefix.
        layer_share: lower-half gradient share of memorized and control paragraphs.
        layer_gradients: set -> gradient sum per layer, memorized and control.
        counts: how many paragraphs were given, memorized, controls, measured, not finite.
        notes: what the reader must know.
        provenance: where the numbers come from.
        model: the model, kept for `attention` and `to_html`; not saved.
        unigrams: the table that defined rarity, kept to colour tokens; not saved.
        seconds: how long it took; not saved, so that equal rankings are equal files.
    """

    score: Float[Tensor, "layer head"]
    ci: Float[Tensor, "bound layer head"]
    p_value: Float[Tensor, "layer head"]
    evidence: Mapping[str, Float[Tensor, "layer head"]]
    memorized_ids: Tensor
    control_ids: Tensor
    names: Mapping[str, tuple[str, ...]]
    n_prefix: int
    layer_share: Mapping[str, float]
    layer_gradients: Mapping[str, Float[Tensor, " layer"]]
    counts: Mapping[str, int]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    model: Any = field(default=None, repr=False, compare=False, metadata={"saved": False})
    unigrams: Any = field(default=None, repr=False, compare=False, metadata={"saved": False})
    seconds: float | None = field(default=None, compare=False, metadata={"saved": False})

    @property
    def q_value(self) -> Float[Tensor, "layer head"]:
        """p-values after Benjamini-Hochberg correction over all heads."""
        return benjamini_hochberg(self.p_value)

    @property
    def significant(self) -> Tensor:
        """Heads with q < 0.05, [layer, head]."""
        return self.q_value < SIGNIFICANCE

    @property
    def memorized(self) -> Paragraphs:
        """The memorized paragraphs that were measured."""
        return Paragraphs(self.memorized_ids, self.n_prefix, tuple(self.names["memorized"]))

    @property
    def control(self) -> Paragraphs:
        """The controls that were measured."""
        return Paragraphs(self.control_ids, self.n_prefix, tuple(self.names["control"]))

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
        self, paragraph: Any, *, heads: int = 4, compare: Any = None, model: Any = None
    ) -> Any:
        """Attention of the best heads on one paragraph, see `memcircuits.attention_view`.

        Args:
            paragraph: one paragraph, such as `ranking.memorized[0]`.
            heads: how many of the best heads.
            compare: a second paragraph shown beside it, such as the perturbed one.
            model: needed by a loaded ranking, which has none.
        """
        from memcircuits.evidence.attention_view import attention_view

        return attention_view(
            self._model(model),
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
        model: Any = None,
        progress: bool = True,
    ) -> Path:
        """Write the self-contained report, see `memcircuits.report.ranking_page`.

        Args:
            path: the HTML file.
            heads: how many of the best heads to show the attention of.
            triggers: for how many paragraphs to find the prefix tokens that trigger them, which
                takes a forward pass of each for every prefix token; 0 leaves the section out.
            model: needed by a loaded ranking, which has none.
            progress: show a bar on stderr.
        """
        from memcircuits.report.ranking_page import ranking_page

        page = ranking_page(
            self, self._model(model), heads=heads, triggers=triggers, progress=progress
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
        n = int(self.significant.sum())
        sets = f"{self.counts['measured']} memorized paragraphs against as many controls"
        if self.counts["measured_control"] != self.counts["measured"]:
            sets = (
                f"{self.counts['measured']} memorized paragraphs against "
                f"{self.counts['measured_control']} controls"
            )
        if not n:
            text = f"No head is significant ({sets}, q < {SIGNIFICANCE})."
            if self.counts["measured"] < FEW:
                text += " So few paragraphs can hardly reach that: read the order and intervals."
            return text
        ranked = [h for h in self.scores.top(self.score.numel()) if self.significant[h]]
        best = ", ".join(str(h) for h in ranked[:5])
        more = f" and {n - 5} more" if n > 5 else ""
        total = self.score.numel()
        return f"{n} of {total} heads are significant ({sets}, q < {SIGNIFICANCE}): {best}{more}."

    def _model(self, model: Any) -> Any:
        found = self.model if model is None else model
        if found is None:
            raise InputError("model", "None", "a loaded ranking has no model: pass model=")
        return found

    def __str__(self) -> str:
        return self.summary()
