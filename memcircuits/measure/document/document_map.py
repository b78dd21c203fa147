"""The result of mapping a document: numbers of every window, and the passages that are recited."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.io import write_atomically
from memcircuits.measure.document.spans import RecitedSpan, largest_at_tokens, runs
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DocumentMap(Result, kind="document-map"):
    """How much of every part of a document the model recites.

    A window is a prefix and a continuation; its numbers are those of `Scan`. Windows whose numbers
    are not finite are left out.

    Attributes:
        name: the document's name.
        text: the document, with line ends as newlines.
        token_starts: place of each token's first character in the text, [token].
        token_ends: place behind its last character, [token].
        n_prefix: tokens of a prefix.
        n_continuation: tokens of a continuation.
        stride: tokens from one window to the next.
        starts: first token of each window, [window].
        measures: name of a measure -> its values, [window]: `em` (tokens), `nll` (nats/token),
            `log_prob` (nats), `loose_match` and `extraction_strength` (in [0, 1]). With a sampler
            also `sampled_log_prob` (nats, may be -inf). If the windows were decoded, also
            `longest_match` (tokens) and `similarity` (in [0, 1]).
        provenance: where the numbers come from.
        notes: what the reader must know.
    """

    name: str
    text: str
    token_starts: Int[Tensor, " token"]
    token_ends: Int[Tensor, " token"]
    n_prefix: int
    n_continuation: int
    stride: int
    starts: Int[Tensor, " window"]
    measures: Mapping[str, Tensor]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {name: len(values) for name, values in self.measures.items()}
        for name, length in lengths.items():
            if length != len(self.starts):
                raise InputError(name, f"{length} values", f"give {len(self.starts)}")
        ends = self.starts + self.n_prefix + self.n_continuation
        if len(ends) and int(ends.max()) > self.n_tokens:
            raise InputError("starts", int(self.starts.max()), "this window ends behind the text")

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the document."""
        return len(self.token_ends)

    @property
    def is_memorized(self) -> Bool[Tensor, " window"]:
        """Whether the whole continuation of a window is recited."""
        return self.measures["em"] == self.n_continuation

    def at_tokens(self, measure: str) -> Float[np.ndarray, " token"]:
        """The largest value that a measure has in any window whose continuation has the token.

        EM counts for the tokens that are recited, and is 0 for the others. NaN where a token is in
        no continuation, as the first `n_prefix` are.

        Raises:
            InputError: if there is no such measure.
        """
        if measure not in self.measures:
            raise InputError("measure", measure, "choose one of " + ", ".join(self.measures))
        values = self.measures[measure].double().numpy()
        starts = self.starts.numpy() + self.n_prefix
        whole = np.full(len(starts), self.n_continuation)
        if measure != "em":
            return largest_at_tokens(starts, whole, values, self.n_tokens)
        scored = largest_at_tokens(starts, whole, np.zeros(len(starts)), self.n_tokens)
        recited = largest_at_tokens(starts, values.astype(int), values, self.n_tokens)
        return np.where(np.isnan(recited), scored, recited)

    @cached_property
    def recited(self) -> Bool[np.ndarray, " token"]:
        """Whether a token is in the continuation of a window that is recited in full."""
        return self.at_tokens("em") == self.n_continuation

    @cached_property
    def scored(self) -> Bool[np.ndarray, " token"]:
        """Whether a token is in the continuation of any window."""
        return ~np.isnan(self.at_tokens("em"))

    @property
    def probability_measure(self) -> str:
        """The measure that says how probable a continuation is as a sample."""
        return "sampled_log_prob" if "sampled_log_prob" in self.measures else "log_prob"

    @property
    def recited_share(self) -> float:
        """Share of the scored tokens that are recited, in [0, 1]."""
        return float(self.recited.sum() / max(1, self.scored.sum()))

    @cached_property
    def spans(self) -> tuple[RecitedSpan, ...]:
        """The recited passages in the order of the text, each as long as it can be made."""
        memorized = self.is_memorized.numpy()
        firsts = (self.starts.numpy() + self.n_prefix)[memorized]
        log_probs = self.measures[self.probability_measure].double().numpy()[memorized]
        spans = []
        for first, stop in runs(self.recited):
            start, end = int(self.token_starts[first]), int(self.token_ends[stop - 1])
            inside = (firsts >= first) & (firsts < stop)
            spans.append(
                RecitedSpan(
                    first_token=first,
                    n_tokens=stop - first,
                    start=start,
                    end=end,
                    line=self.text.count("\n", 0, start) + 1,
                    n_windows=int(inside.sum()),
                    log_prob=float(log_probs[inside].max()),
                )
            )
        return tuple(spans)

    def to_frame(self) -> pd.DataFrame:
        """One row per window: the characters of its continuation, and its measures.

        Columns `first_token, start, end, em, nll, log_prob, loose_match, extraction_strength,
        memorized`, and those of decoded windows.
        """
        import pandas as pd

        first = self.starts + self.n_prefix
        columns = {name: values.double().numpy() for name, values in self.measures.items()}
        return pd.DataFrame(
            {
                "first_token": first.numpy(),
                "start": self.token_starts[first].numpy(),
                "end": self.token_ends[first + self.n_continuation - 1].numpy(),
                **columns,
                "em": self.measures["em"].long().numpy(),
                "memorized": self.is_memorized.numpy(),
            }
        )

    def spans_frame(self) -> pd.DataFrame:
        """The recited passages, the longest first.

        Columns `line, start, end` (characters), `first_token, n_tokens, n_windows, log_prob,
        probability, text`; `probability` is that of the likeliest window.
        """
        import pandas as pd

        longest_first = sorted(self.spans, key=lambda span: (-span.n_tokens, span.start))
        rows = [
            {
                **dataclasses.asdict(span),
                "probability": float(np.exp(span.log_prob)),
                "text": self.text[span.start : span.end],
            }
            for span in longest_first
        ]
        fields = [field.name for field in dataclasses.fields(RecitedSpan)]
        return pd.DataFrame(rows, columns=[*fields, "probability", "text"])

    def figure(self) -> Any:
        """EM and NLL along the text (plotly)."""
        from memcircuits.display import figures

        panels = {"em": "exact match (tokens)", "nll": "NLL (nats/token)"}
        frame = self.to_frame()
        x_label = f"character of {self.name}"
        return figures.curves(
            frame, "start", panels, title=str(self), x_label=x_label, markers=False
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the map as one page that needs no network (`memcircuits.measure.document.page`)."""
        from memcircuits.measure.document.page import map_page

        return map_page(self).save(Path(path))

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write totals, passages, windows and provenance as JSON; -inf becomes null."""
        data = {
            "schema": "memcircuits.document-map/1",
            "summary": str(self),
            "name": self.name,
            "n_characters": len(self.text),
            "n_tokens": self.n_tokens,
            "recited_share": self.recited_share,
            "n_prefix": self.n_prefix,
            "n_continuation": self.n_continuation,
            "stride": self.stride,
            "notes": list(self.notes),
            "spans": _records(self.spans_frame()),
            "windows": _records(self.to_frame()),
            "provenance": dataclasses.asdict(self.provenance),
        }
        return write_atomically(path, json.dumps(data, indent=1) + "\n")

    def __str__(self) -> str:
        n_recited, n_spans = int(self.recited.sum()), len(self.spans)
        passages = "1 passage" if n_spans == 1 else f"{n_spans:,} passages"
        return (
            f"{self.name}: {n_recited:,} of {int(self.scored.sum()):,} tokens recited, in "
            f"{passages}; {len(self.starts):,} windows"
        )


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=10))
    return rows
