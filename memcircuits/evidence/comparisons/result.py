"""What `compare` found: passages gained and lost, and heads that matter more or less."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.heads import Head
from memcircuits.base.statistics import benjamini_hochberg, bootstrap_interval, group_means
from memcircuits.data.tokens import TokenizerLike
from memcircuits.measure.snippets import passage_text, snippet
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from memcircuits.results.score_map import ScoreMap

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANCE = 0.05
"""Heads whose change has a smaller q-value are significant."""

NAMED_HEADS = 5
"""Maximum number of heads that the summary names."""

Measure: TypeAlias = Literal["em", "nll"]
"""Tokens recited, or loss of the continuation (nats/token)."""


@dataclass(frozen=True)
class Comparison(Result, kind="comparison"):
    """Two models, a and b, on the same paragraphs; every change is b minus a.

    A comparison of two scans has no heads, one of two rankings no paragraphs.

    Attributes:
        labels: what a and b are called.
        ids: token ids of the paragraphs that both have, [paragraph, pos].
        n_prefix: number of tokens of the prefix.
        names: the paragraphs' names.
        groups: number of each paragraph's independent group, [paragraph].
        em: tokens recited, [model, paragraph].
        nll: loss of the continuation, nats/token, [model, paragraph].
        scores: memorized minus control ablation effect, nats/token, [model, layer, head].
        ci: 95 % bootstrap interval of the change of the score over independent groups, [bound,
            layer, head]; NaN where there is none.
        p_value: of that change, two-sided, [layer, head].
        n_groups: set (`memorized`, `control`) -> number of groups that the scores are of.
        provenance: model b, and in `options` model a.
        notes: what the reader must know.
        model: a model whose tokenizer shows the passages; not saved.
    """

    labels: tuple[str, ...]
    ids: Int[Tensor, "paragraph pos"]
    n_prefix: int
    names: tuple[str, ...]
    groups: Int[Tensor, " paragraph"]
    em: Int[Tensor, "model paragraph"]
    nll: Float[Tensor, "model paragraph"]
    scores: Float[Tensor, "model layer head"]
    ci: Float[Tensor, "bound layer head"]
    p_value: Float[Tensor, "layer head"]
    n_groups: Mapping[str, int]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    model: TokenizerLike | None = field(
        default=None, repr=False, compare=False, metadata={"saved": False}
    )

    @property
    def n_continuation(self) -> int:
        """Number of tokens of the continuation."""
        return self.ids.shape[1] - self.n_prefix

    @property
    def has_passages(self) -> bool:
        """Whether paragraphs were compared."""
        return len(self.names) > 0

    @property
    def has_heads(self) -> bool:
        """Whether heads were compared."""
        return self.p_value.numel() > 0

    @property
    def memorized(self) -> Bool[Tensor, "model paragraph"]:
        """Which paragraphs are recited in full, [model, paragraph]."""
        return self.em == self.n_continuation

    @property
    def gained(self) -> Bool[Tensor, " paragraph"]:
        """Recited in full by b and not by a, [paragraph]."""
        return self.memorized[1] & ~self.memorized[0]

    @property
    def lost(self) -> Bool[Tensor, " paragraph"]:
        """Recited in full by a and not by b, [paragraph]."""
        return self.memorized[0] & ~self.memorized[1]

    @property
    def kept(self) -> Bool[Tensor, " paragraph"]:
        """Recited in full by both, [paragraph]."""
        return self.memorized.all(0)

    def mean_change(self, measure: Measure = "em") -> tuple[float, float, float]:
        """Mean change over independent groups, and its paired 95 % interval.

        Args:
            measure: `em` (tokens) or `nll` (nats/token).

        Raises:
            InputError: for another measure, or if no paragraphs were compared.
        """
        one_of("measure", measure, get_args(Measure))
        if not self.has_passages:
            raise InputError("measure", measure, "two rankings have no paragraphs to compare")
        values = (self.em if measure == "em" else self.nll).double()
        change = values[1] - values[0]
        low, high = bootstrap_interval(change, self.groups).tolist()
        return float(group_means(change, self.groups).mean()), low, high

    @property
    def head_change(self) -> ScoreMap:
        """By how much each head matters more in b than in a.

        Raises:
            InputError: if no heads were compared.
        """
        if not self.has_heads:
            raise InputError("heads", "none compared", "; ".join(self.notes) or "give two models")
        change = self.scores[1] - self.scores[0]
        return ScoreMap("change of the memorization score", "nats/token", change, self.provenance)

    @property
    def q_value(self) -> Float[Tensor, "layer head"]:
        """p-values after Benjamini-Hochberg correction over all heads."""
        return benjamini_hochberg(self.p_value)

    @property
    def significant(self) -> Bool[Tensor, "layer head"]:
        """Heads whose change has q < 0.05, [layer, head]."""
        return self.q_value < SIGNIFICANCE

    def to_frame(self) -> pd.DataFrame:
        """One row per paragraph, the largest changes of EM first.

        Columns `id, passage` (`gained`, `lost`, `kept`, or empty), `em_a, em_b, em_change, nll_a,
        nll_b, nll_change, group`.
        """
        import pandas as pd

        passage = [""] * len(self.names)
        for name in ("gained", "lost", "kept"):
            for row in getattr(self, name).nonzero().flatten().tolist():
                passage[row] = name
        frame = pd.DataFrame({"id": list(self.names), "passage": passage})
        for name, values in (("em", self.em), ("nll", self.nll.double())):
            frame[f"{name}_a"], frame[f"{name}_b"] = values.numpy()
            frame[f"{name}_change"] = (values[1] - values[0]).numpy()
        frame["group"] = self.groups.numpy()
        order = frame["em_change"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def changes(self, kind: Literal["gains", "losses"], n: int = 10) -> pd.DataFrame:
        """The paragraphs of which b recites more, or fewer, tokens than a, as text.

        Columns `id, passage, em_a, em_b, text`, the largest changes first, at most `n` rows. In
        `text` a bar stands between the end of the prefix and the continuation.

        Raises:
            InputError: for another kind.
        """
        one_of("kind", kind, ("gains", "losses"))
        frame = self.to_frame()
        changed = frame["em_change"] > 0 if kind == "gains" else frame["em_change"] < 0
        frame = frame.loc[changed, ["id", "passage", "em_a", "em_b"]].head(n)
        row_of = {name: row for row, name in enumerate(self.names)}
        texts = [
            passage_text(self.ids[row_of[name]].tolist(), self.n_prefix, 0, self.model)
            for name in frame["id"]
        ]
        return frame.assign(text=list(map(snippet, texts))).reset_index(drop=True)

    def heads_frame(self) -> pd.DataFrame:
        """One row per head, the largest changes first.

        Columns `layer, head, name, score_a, score_b, change, ci_low, ci_high, p_value, q_value,
        significant`.

        Raises:
            InputError: if no heads were compared.
        """
        frame = self.head_change.to_frame().rename(columns={"value": "change"})
        frame.insert(2, "name", [str(Head(*row)) for row in frame[["layer", "head"]].to_numpy()])
        columns = {"score_a": self.scores[0], "score_b": self.scores[1]}
        for place, (name, values) in enumerate(columns.items(), start=3):
            frame.insert(place, name, values.flatten().double().numpy())
        columns = {
            "ci_low": self.ci[0],
            "ci_high": self.ci[1],
            "p_value": self.p_value,
            "q_value": self.q_value,
            "significant": self.significant,
        }
        for name, values in columns.items():
            frame[name] = values.flatten().numpy()
        order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def texts(self, model: TokenizerLike | None = None) -> list[str]:
        """The end of each prefix, a bar, and the continuation; empty without a tokenizer.

        Args:
            model: a model (or tokenizer) that the ids are of; by default the one compared.
        """
        model = self.model if model is None else model
        if model is None or getattr(model, "tokenizer", model) is None:
            return [""] * len(self.names)
        return [
            snippet(passage_text(row, self.n_prefix, 0, model), whole=True)
            for row in self.ids.tolist()
        ]

    def figure(self) -> Any:
        """EM under a and b of every paragraph; of two rankings, the map of heads (plotly)."""
        from memcircuits.display import figures

        if not self.has_passages:
            return self.heads_figure()
        return figures.em_against_em(
            self.to_frame(), labels=self.labels, title=f"Tokens recited, of {self.n_continuation}"
        )

    def heads_figure(self) -> Any:
        """A layer x head heatmap of the change, significant heads framed (plotly).

        Raises:
            InputError: if no heads were compared.
        """
        from memcircuits.display import figures

        return figures.heatmap(
            self.head_change.values,
            title=f"Memorization score: {self.labels[1]} minus {self.labels[0]}",
            name="change",
            units="nats/token",
            diverging=True,
            marks=self.significant,
        )

    def to_html(self, path: str | os.PathLike[str], *, model: TokenizerLike | None = None) -> Path:
        """Write the self-contained page.

        Args:
            path: the HTML file.
            model: as in `texts`.
        """
        from memcircuits.evidence.comparisons.page import comparison_page

        return comparison_page(self, self.texts(model)).save(Path(path))

    def __str__(self) -> str:
        parts = []
        if self.has_passages:
            mean, low, high = self.mean_change("em")
            parts.append(
                f"{len(self.names):,} paragraphs: {int(self.gained.sum()):,} gained, "
                f"{int(self.lost.sum()):,} lost, {int(self.kept.sum()):,} kept; "
                f"EM {mean:+.2f} tokens ({low:.2f} to {high:.2f})"
            )
        if self.has_heads:
            n_significant = int(self.significant.sum())
            text = f"{n_significant} of {self.p_value.numel()} heads change (q < {SIGNIFICANCE})"
            if n_significant:
                frame = self.heads_frame()
                names = frame[frame["significant"]]["name"].head(NAMED_HEADS)
                text += f": {', '.join(names)}" + ", ..." * (n_significant > NAMED_HEADS)
            parts.append(text)
        return f"{self.labels[0]} -> {self.labels[1]}: {'; '.join(parts)}"


def no_heads() -> dict[str, Any]:
    """The fields of a comparison without heads."""
    empty = torch.empty(2, 0, 0)
    return {"scores": empty, "ci": empty, "p_value": empty[0], "n_groups": {}}


def no_passages(n_prefix: int, length: int) -> dict[str, Any]:
    """The fields of a comparison without paragraphs."""
    return {
        "ids": torch.empty(0, length, dtype=torch.long),
        "n_prefix": n_prefix,
        "names": (),
        "groups": torch.empty(0, dtype=torch.long),
        "em": torch.empty(2, 0, dtype=torch.long),
        "nll": torch.empty(2, 0),
    }
