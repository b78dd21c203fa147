"""Which paragraphs does the model recite? EM, NLL and margins by one forward pass each.

A paragraph is memorized when all continuation tokens are recited (EM = 50 in the paper) and a
control when at most a fifth of them are (EM <= 10 of 50), section 3 of the paper
(arXiv 2403.19851).

Greedy decoding is only one way to extract text; `memcircuits.measure.paragraph_measures` has more.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.groups import GROUP_COLUMN
from memcircuits.data.metadata import own_columns
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import TokenizerLike
from memcircuits.display.html_table import table_html
from memcircuits.measure.as_written import comparison, em_as_written
from memcircuits.measure.continuation import Continuation, score_paragraphs
from memcircuits.measure.near_verbatim import decoded_where_unknown
from memcircuits.measure.overlapping_windows import best_apart, count_places
from memcircuits.measure.paragraph_measures import ParagraphMeasures
from memcircuits.measure.recitation_statistics import (
    REPETITION_COLUMNS,
    by_repetitions,
)
from memcircuits.measure.sampling import Sampler
from memcircuits.measure.snippets import passage_text, snippet
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

_SHORT = 5  # tokens of a continuation, below which chance alone recites


@dataclass(frozen=True)
class Scan(ParagraphMeasures, Result, kind="scan"):
    """How well the model predicts each paragraph's continuation.

    Attributes:
        ids: token ids [paragraph, pos].
        n_prefix: number of tokens of the prefix.
        names: the paragraphs' names.
        metadata: the paragraphs' further columns.
        token_log_prob: log p of each continuation token, nats, [paragraph, pos].
        token_correct: whether it is the greedy choice, [paragraph, pos].
        token_margin: top-2 logit margin, [paragraph, pos].
        provenance: where the numbers come from.
        notes: what the reader must know.
        bos: ids of the tokens in front of every paragraph.
        token_sampled: log p of each continuation token where the `sampler` of `scan` draws it,
            nats, [paragraph, pos]; None if none was given.
        greedy: token ids of the greedy continuation, [paragraph, pos]; None if it was not asked
            for.
        tokenizer: the model's tokenizer, kept for `to_html`; not saved.
    """

    ids: Tensor
    n_prefix: int
    names: tuple[str, ...]
    metadata: Mapping[str, tuple[Any, ...]]
    token_log_prob: Float[Tensor, "paragraph pos"]
    token_correct: Bool[Tensor, "paragraph pos"]
    token_margin: Float[Tensor, "paragraph pos"]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    bos: tuple[int, ...] = ()
    token_sampled: Float[Tensor, "paragraph pos"] | None = None
    greedy: Int[Tensor, "paragraph pos"] | None = None
    tokenizer: Any = field(default=None, compare=False, metadata={"saved": False})

    former_names: ClassVar[Mapping[str, str]] = {"facts": "metadata"}

    @classmethod
    def of(
        cls,
        paragraphs: Paragraphs,
        scores: Continuation,
        provenance: Provenance,
        greedy: Int[Tensor, "paragraph pos"] | None = None,
    ) -> Scan:
        """Paragraphs, the scores of their continuations, and perhaps what is written instead."""
        return cls(
            ids=paragraphs.ids,
            n_prefix=paragraphs.n_prefix,
            names=paragraphs.names,
            metadata=paragraphs.metadata,
            token_log_prob=scores.log_prob,
            token_correct=scores.correct,
            token_margin=scores.margin,
            provenance=provenance,
            bos=paragraphs.bos,
            token_sampled=scores.sampled,
            greedy=greedy,
        )

    @cached_property
    def paragraphs(self) -> Paragraphs:
        """All paragraphs scanned."""
        return Paragraphs(
            self.ids,
            self.n_prefix,
            tuple(self.names),
            self.metadata,
            self.bos,
            reading_options=self.provenance.reading_options("paragraphs"),
        )

    @property
    def memorized(self) -> Paragraphs | None:
        """The memorized paragraphs; None if there are none."""
        return self.paragraphs[self.is_memorized] if self.is_memorized.any() else None

    @property
    def control(self) -> Paragraphs | None:
        """The controls, paragraphs that are hardly recited; None if there are none."""
        return self.paragraphs[self.is_control] if self.is_control.any() else None

    def to_frame(self) -> pd.DataFrame:
        """The measures and the metadata, one row per paragraph.

        Columns `id, em, nll, log_prob, margin, bits, loose_match, min_k, extraction_strength,
        samples, bucket, memorized, finite, group`; `samples` are those needed for a probability of
        0.9, and `group` says which paragraphs depend on each other (`Paragraphs.groups`). With a
        sampler also `sampled_log_prob`; with decoding also `longest_match, similarity,
        near_verbatim`. A fact that has the name of a measure is called `given_...`.
        """
        import pandas as pd

        measures = {
            "id": self.names,
            "em": self.em.numpy(),
            "nll": self.nll.double().numpy(),
            "log_prob": self.log_prob.double().numpy(),
            "margin": self.margin.double().numpy(),
            "bits": self.bits.double().numpy(),
            "loose_match": self.loose_match.double().numpy(),
            "min_k": self.min_k().double().numpy(),
            "extraction_strength": self.extraction_strength.double().numpy(),
            "samples": self.samples_needed().numpy(),
            "bucket": self.buckets,
            "memorized": self.is_memorized.numpy(),
            "finite": self.finite.numpy(),
        }
        optional = {
            "sampled_log_prob": None if self.token_sampled is None else self.sampled_log_prob,
            "longest_match": self.longest_match,
            "similarity": self.similarity,
            "near_verbatim": self.is_near_verbatim,
        }
        measures |= {name: v.numpy() for name, v in optional.items() if v is not None}
        if GROUP_COLUMN not in self.metadata:
            measures[GROUP_COLUMN] = self.paragraphs.groups.numpy()
        metadata = {
            f"given_{key}" if key in measures else key: list(values)
            for key, values in self.metadata.items()
        }
        return pd.DataFrame({**measures, **metadata})

    def by_repetitions(self) -> pd.DataFrame:
        """The duplication curve (figure 2): EM and NLL against times seen in training.

        Columns and errors: see `memcircuits.measure.recitation_statistics.by_repetitions`.
        """
        return by_repetitions(self.to_frame())

    def figure(self) -> Any:
        """The duplication curve where counts are known, else EM against NLL (plotly)."""
        from memcircuits.display import figures

        if any(key in self.metadata for key in REPETITION_COLUMNS):
            frame = self.by_repetitions()
            return figures.duplication_curve(frame[frame["repetitions"] > 0], title=str(self))
        return figures.em_against_nll(self.to_frame(), title=str(self))

    def to_html(self, path: str | os.PathLike[str], *, model: TokenizerLike | None = None) -> Path:
        """Write the passages and their numbers as one page that needs no network.

        Args:
            path: the page.
            model: model or tokenizer, for the texts of a scan that was loaded, which has none;
                without it token ids are shown.
        """
        from memcircuits.measure.scan_page import scan_page

        return scan_page(self, self.tokenizer if model is None else model).save(Path(path))

    @property
    def own_columns(self) -> list[str]:
        """Metadata that the paragraphs' file gives about each, in short values."""
        return own_columns(self.metadata)

    @property
    def n_places(self) -> int:
        """Number of places that are recited in full; overlapping windows are one place."""
        n_continuation = self.token_correct.shape[1]
        rows = self.is_memorized.nonzero().flatten().tolist()
        return count_places(self.names, self.ids, n_continuation, rows)

    def longest_rows(self, n: int) -> list[int]:
        """Rows of at most `n` longest recitations, of which none overlaps a better one."""
        order = np.lexsort((self.nll.numpy(), -self.em.numpy()))
        n_continuation = self.token_correct.shape[1]
        return best_apart(self.names, self.ids, n_continuation, order.tolist(), n)

    def longest(self, n: int = 10) -> pd.DataFrame:
        """The longest recitations as text: columns `id, em, nll, text`, at most `n` rows.

        In `text` a bar stands between the end of the prefix and the continuation. Ties go to the
        lower NLL. Of overlapping windows of one document the best is listed. With a sampler also
        `samples`, with decoding also `similarity` (`to_frame`), and before `text` the `own_columns`
        of the paragraphs.
        """
        asked = {"samples": self.token_sampled, "similarity": self.similarity}
        on_request = [name for name, measured in asked.items() if measured is not None]
        frame = self.to_frame()
        columns = [
            "id",
            "em",
            "nll",
            *on_request,
            *(key for key in self.own_columns if key in frame),
        ]
        frame = frame.loc[self.longest_rows(n), columns]
        rows = [
            passage_text(self.ids[row].tolist(), self.n_prefix, int(em), self.tokenizer)
            for row, em in zip(frame.index.tolist(), frame["em"], strict=True)
        ]
        return frame.assign(text=list(map(snippet, rows))).reset_index(drop=True)

    def _repr_html_(self) -> str:
        longest = self.longest(20)
        about = f"The {len(longest)} longest recitations of {len(self.names):,}:"
        return table_html(longest, [str(self), *self.notes, about])

    def __str__(self) -> str:
        near = self.is_near_verbatim
        slips = "" if near is None else f"{int((near & ~self.is_memorized).sum())} nearly, "
        return (
            f"{len(self.names)} paragraphs, {int(self.is_memorized.sum())} memorized, {slips}"
            f"{int(self.is_control.sum())} controls"
        )


@plain_torch()
def scan(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    sampler: Sampler | None = None,
    near_verbatim: bool = False,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Scan:
    """Measure how much of each paragraph the model recites.

    Args:
        model: the model.
        paragraphs: the paragraphs.
        sampler: how text is drawn, for `Scan.extraction` and `Scan.samples_needed`; by default
            from the model's own distribution.
        near_verbatim: also decode what is not recited in full, for `Scan.similarity` and
            `Scan.longest_match`.
        batch_size: paragraphs per forward pass; by default as many as fit.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Scan`; paragraphs with non-finite numbers are marked in `Scan.finite`.

    Raises:
        InputError: for paragraphs that are unusable with this model.

    Example:
        >>> result = mc.scan(model, memorized + control)
        >>> print(result)
        8 paragraphs, 4 memorized, 4 controls
        >>> result.em[:4].tolist()
        [50, 50, 50, 50]
    """
    if batch_size is not None:
        at_least("batch_size", batch_size, 1)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    with bar(len(paragraphs), "scan", progress=progress) as progress_bar:
        scores = score_paragraphs(
            adapter,
            paragraphs,
            batch_size=batch_size,
            memory_budget=memory_budget,
            sampler=sampler,
            done=progress_bar.update,
        )
    greedy = None
    if near_verbatim:
        greedy = decoded_where_unknown(
            adapter, paragraphs, scores, memory_budget=memory_budget, progress=progress
        )
    options = {} if sampler is None else {"sampler": dataclasses.asdict(sampler)}
    provenance = Provenance.of(adapter, {"paragraphs": paragraphs}, **options)
    result = Scan.of(paragraphs, scores, provenance, greedy)
    tokenizer = adapter.tokenizer
    written = em_as_written(adapter, paragraphs, memory_budget=memory_budget)
    metadata = dict(result.metadata)
    if written:
        metadata["em_as_written"] = tuple(map(written.get, range(len(paragraphs))))
    notes = (*paragraphs.notes, *comparison(result.em, written, paragraphs.n_continuation))
    notes = (*result.notes, *notes, *_about_short(paragraphs.n_continuation))
    return dataclasses.replace(result, metadata=metadata, notes=notes, tokenizer=tokenizer)


def _about_short(n_continuation: int) -> tuple[str, ...]:
    """A note where the greedy choice is often right without any memory of the text."""
    if n_continuation >= _SHORT:
        return ()
    return (
        f"{n_continuation} tokens of continuation are often right by chance: compare with text "
        "that the model cannot have seen",
    )


def has_finite_scores(
    adapter: Adapter,
    paragraphs: Paragraphs,
    argument: str = "paragraphs",
    memory_budget: int | None = None,
) -> Bool[Tensor, " paragraph"]:
    """Which paragraphs have finite scores. The others would make every mean NaN.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        argument: their name in the error.
        memory_budget: maximum bytes per batch.

    Raises:
        InputError: if no paragraph has.
    """
    finite = score_paragraphs(adapter, paragraphs, memory_budget=memory_budget).finite
    if not finite.any():
        raise InputError(
            argument, "non-finite logits on every paragraph", "load the model in float32"
        )
    return finite
