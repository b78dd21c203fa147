"""What `counterfactual` measured: the bits of every token, by part, and kinds of recitations.

The parts are those of `memcircuits.evidence.counterfactual`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import (
    bootstrap_interval,
    finite_mean,
    finite_rows,
    group_means,
)
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.tokens import TokenizerLike
from memcircuits.evidence.recitation_kinds import recitation_kind
from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Tokens

PARTS = ("guessable", "known", "remembered", "unexplained")
"""The terms of a token's bits, in the order in which they are stacked."""


@dataclass(frozen=True)
class Counterfactual(Result, kind="counterfactual"):
    """Log-probabilities of the same tokens under a model, its twin and an n-gram model.

    Attributes:
        ids: token ids, [paragraph, pos].
        n_prefix: number of tokens of the prefix.
        names: the paragraphs' names.
        metadata: the paragraphs' further columns.
        log_prob: log p of each continuation token under the model, nats, [paragraph, pos].
        twin_log_prob: under the twin.
        ngram_log_prob: under the n-gram model.
        em: tokens recited by the model, [paragraph].
        twin_em: tokens recited by the twin, [paragraph].
        d_vocab: size V of the vocabulary.
        templates: the template that each paragraph follows, `repeating`, `incrementing` or empty.
        provenance: where the numbers come from; `options` names the twin and the n-gram model.
        notes: what the reader must know.
        bos: ids of the tokens in front of every paragraph.
    """

    ids: Int[Tensor, "paragraph pos"]
    n_prefix: int
    names: tuple[str, ...]
    metadata: Mapping[str, tuple[Any, ...]]
    log_prob: Float[Tensor, "paragraph pos"]
    twin_log_prob: Float[Tensor, "paragraph pos"]
    ngram_log_prob: Float[Tensor, "paragraph pos"]
    em: Int[Tensor, " paragraph"]
    twin_em: Int[Tensor, " paragraph"]
    d_vocab: int
    templates: tuple[str, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    bos: tuple[int, ...] = ()

    @property
    def whole(self) -> float:
        """Bits that name one token of the vocabulary: what the four parts add up to."""
        return math.log2(self.d_vocab)

    @property
    def guessable(self) -> Float[Tensor, "paragraph pos"]:
        """Bits of each token that the n-gram model knows."""
        return _bits(self.ngram_log_prob) + self.whole

    @property
    def known(self) -> Float[Tensor, "paragraph pos"]:
        """Bits of each token that the twin knows beyond the n-gram model."""
        return _bits(self.twin_log_prob - self.ngram_log_prob)

    @property
    def remembered(self) -> Float[Tensor, "paragraph pos"]:
        """Bits of each token that the model knows beyond its twin."""
        return _bits(self.log_prob - self.twin_log_prob)

    @property
    def unexplained(self) -> Float[Tensor, "paragraph pos"]:
        """Bits of each token that the model does not know."""
        return -_bits(self.log_prob)

    @cached_property
    def paragraphs(self) -> Paragraphs:
        """The paragraphs."""
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names), self.metadata, self.bos)

    @property
    def kinds(self) -> list[str]:
        """Of paragraphs recited in full, see `recitation_kind`; empty for others."""
        column = next((name for name in REPETITION_COLUMNS if name in self.metadata), None)
        duplicates = self.metadata[column] if column else [None] * len(self.names)
        n = self.log_prob.shape[1]
        return [
            recitation_kind(count, template) if em == n else ""  # type: ignore[arg-type]
            for count, template, em in zip(
                duplicates, self.templates, self.em.tolist(), strict=True
            )
        ]

    def to_frame(self) -> pd.DataFrame:
        """One row per paragraph: bits of the whole continuation, and the metadata.

        Columns `id, em, twin_em, guessable, known, remembered, unexplained, template, kind`. A
        column of the metadata that has one of these names is called `given_...`.
        """
        import pandas as pd

        measures = {
            "id": list(self.names),
            "em": self.em.numpy(),
            "twin_em": self.twin_em.numpy(),
            **{part: getattr(self, part).double().sum(-1).numpy() for part in PARTS},
            "template": list(self.templates),
            "kind": self.kinds,
        }
        metadata = {
            f"given_{key}" if key in measures else key: list(values)
            for key, values in self.metadata.items()
        }
        return pd.DataFrame({**measures, **metadata})

    def tokens(self, index: int = 0, model: TokenizerLike | None = None) -> pd.DataFrame:
        """One row per continuation token of a paragraph.

        Args:
            index: the paragraph.
            model: a model or tokenizer; with it `text` holds the text of the token, else its id.

        Returns:
            Columns `position, token, text, guessable, known, remembered, unexplained`.
        """
        import pandas as pd

        paragraph = self.paragraphs[index]
        ids = paragraph.continuation[0].tolist()
        text = [str(token) for token in ids] if model is None else paragraph.tokens(model)
        return pd.DataFrame(
            {
                "position": range(self.n_prefix, self.n_prefix + len(ids)),
                "token": ids,
                "text": text[-len(ids) :],
                **{part: getattr(self, part)[index].double().numpy() for part in PARTS},
            }
        )

    def by(self, column: str, *, seed: int = 0) -> pd.DataFrame:
        """Means over the paragraphs of each value of a metadata column, such as `repetitions`.

        Args:
            column: its name.
            seed: seed of the bootstrap over independent groups of paragraphs.

        Returns:
            One row per value: the column, `n`, `em`, `twin_em` (tokens), and for each part of the
            bits its mean in bits/token; `remembered` with its 95 % interval `_low`, `_high`, which
            is NaN for a single group. Paragraphs with non-finite numbers are left out.

        Raises:
            InputError: if the paragraphs have no such column.
        """
        import pandas as pd

        if column not in self.metadata:
            known = ", ".join(self.metadata) or "none"
            raise InputError("column", repr(column), f"the paragraphs have {known}")
        values = self.metadata[column]
        finite = finite_rows(self.remembered)
        rows = []
        for value in sorted(set(values), key=lambda v: (str(type(v)), v)):
            chosen = torch.tensor([v == value for v in values]) & finite
            if not chosen.any():
                continue
            groups = self.paragraphs.groups[chosen]

            def mean(values: Tensor, chosen: Tensor = chosen, groups: Tensor = groups) -> float:
                return float(group_means(values[chosen].float(), groups).mean())

            low, high = _interval(self.remembered[chosen].mean(-1), groups, seed)
            rows.append(
                {
                    column: value,
                    "n": int(chosen.sum()),
                    "em": mean(self.em),
                    "twin_em": mean(self.twin_em),
                    **{part: mean(getattr(self, part)) for part in PARTS},
                    "remembered_low": low,
                    "remembered_high": high,
                }
            )
        return pd.DataFrame(rows)

    def figure(self, index: int = 0, model: TokenizerLike | None = None) -> Any:
        """The bits of every continuation token of one paragraph, stacked (plotly).

        Args:
            index: the paragraph.
            model: a model or tokenizer that gives the tokens' text.
        """
        from memcircuits.display import figures

        frame = self.tokens(index, model)
        title = f"{self.names[index]}: what each token is known from"
        return figures.token_bits(frame, PARTS, title=title)

    def block(self, model: TokenizerLike, index: int = 0) -> Tokens:
        """The paragraph as a block of a page, its continuation coloured by remembered bits.

        The colours of all paragraphs of the result are the same.
        """
        from memcircuits.display.pages import Strip, Tokens

        bits = self.remembered[index]
        finite = self.remembered[self.remembered.isfinite()]
        most = max(float(finite.max()), 1e-6) if len(finite) else 1.0
        total = float(bits[bits.isfinite()].double().sum())
        n, em, twin_em = len(bits), int(self.em[index]), int(self.twin_em[index])
        as_well = " The twin recites it as well." if twin_em == n else ""
        values = [math.nan] * self.n_prefix + bits.where(bits.isfinite(), torch.nan).tolist()
        return Tokens(
            self.paragraphs.tokens(model, index),
            Strip(values, "bits", limits=(0.0, most)),
            "remembered",
            self.n_prefix,
            title=f"{self.names[index]}: {total:.1f} bits remembered; EM {em} of {n}, twin "
            f"{twin_em}",
            note="Bits of each token that the model knows and its twin does not; without colour: "
            f"none, or the twin knows the token better.{as_well}",
        )

    def __str__(self) -> str:
        mean = float(finite_mean(self.remembered, self.paragraphs.groups).mean())
        low, high = _interval(self.remembered.mean(-1), self.paragraphs.groups, 0)
        return (
            f"{len(self.names)} paragraphs, {mean:.2f} [{low:.2f}, {high:.2f}] of "
            f"{self.whole:.1f} bits/token remembered"
        )


def _bits(nats: Tensor) -> Tensor:
    return nats / math.log(2)


def _interval(
    samples: Float[Tensor, " paragraph"], groups: Int[Tensor, " paragraph"], seed: int
) -> tuple[float, float]:
    """95 % interval of the mean over groups; NaN for a single one, which has none."""
    finite = samples.isfinite()
    if not finite.any():
        return math.nan, math.nan
    low, high = bootstrap_interval(samples[finite], groups[finite], seed=seed)
    return float(low), float(high)
