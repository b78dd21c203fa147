"""How much of a recitation is memory? Bits per token, against a model that never saw the text.

A language model predicts a recited token well for three reasons: any text has it often, any model
trained on such texts knows it, or this model saw this text. A *twin*, a model that was trained in
the same way without the paragraph, tells the last two apart, and an n-gram model the first two. For
a vocabulary of V tokens and token x, each term in bits,

    log2 V      = guessable + known + remembered + unexplained
    guessable   = log2 p_ngram(x) + log2 V
    known       = log2 p_twin(x) - log2 p_ngram(x)
    remembered  = log2 p_model(x) - log2 p_twin(x)
    unexplained = -log2 p_model(x)

where every p is conditioned on the tokens before x, as far as its model reads them. `remembered` is
the counterfactual memorization of Zhang et al. (2021, arXiv 2112.12938), token by token and with
one model for each side. Every term may be negative: the twin may guess better than the n-gram model
knows. Sums and means are unbiased for that reason, and nothing is cut at zero.

The twin decides what `remembered` means. With a true twin it is what training on these paragraphs
wrote, up to what two trainings differ by chance (a twin of other order but the same paragraphs
shows how much that is). With a smaller model, an earlier checkpoint or a model of other data in its
place, it also holds whatever else the model knows and the reference does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.progress import bar
from memcircuits.base.statistics import (
    bootstrap_interval,
    finite_mean,
    finite_rows,
    group_means,
    group_notes,
    left_out,
)
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import TokenizerLike, refuse_other_tokenizer
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.recitation_kinds import recitation_kind, template_of
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Tokens

NGram: TypeAlias = (
    UnigramTable | Callable[[Int[Tensor, "paragraph pos"]], Float[Tensor, "paragraph pos"]]
)
"""Token counts, or a function from token ids to the log-probability (nats) of each token given
those before it, such as `memcircuits.organism_build.kneser_ney.KneserNey.log_prob`."""

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
        """`recite`, `reconstruct` or `recollect` for paragraphs recited in full, else empty."""
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
        """The paragraph as a block of a page, its continuation coloured by remembered bits."""
        from memcircuits.display.pages import Strip, Tokens

        bits = self.remembered[index]
        values = [math.nan] * self.n_prefix + bits.where(bits.isfinite(), torch.nan).tolist()
        return Tokens(
            self.paragraphs.tokens(model, index),
            Strip(values, "bits"),
            "remembered",
            self.n_prefix,
            title=f"What is remembered of {self.names[index]}",
            note="Bits of each token that the model knows and its twin, which was not trained on "
            "the paragraph, does not.",
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


@plain_torch()
def counterfactual(
    model: Model,
    twin: Model,
    paragraphs: ParagraphsLike,
    *,
    ngram: NGram | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Counterfactual:
    """Split every token of the continuations into what is guessable, known and remembered.

    Args:
        model: the model that may have memorized the paragraphs.
        twin: a model of the same tokenizer that was not trained on them; its size may differ.
        paragraphs: the paragraphs.
        ngram: token counts, or a function from ids [paragraph, pos] to the log p (nats) of each
            token given those before it; without one, nothing counts as guessable and `known` is all
            that the twin knows.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Counterfactual`: bits per token, and of each memorized paragraph whether it is recited,
        reconstructed or recollected.

    Raises:
        InputError: for models of different tokenizers, unusable paragraphs, or an n-gram model of
            another tokenizer or of another shape.

    Example:
        >>> planted = mc.load_model("organism-planted", device="cpu")
        >>> result = mc.counterfactual(planted, model, control, progress=False)
        >>> result.remembered.shape  # [paragraph, pos]
        torch.Size([4, 50])
    """
    adapter, twin_adapter = adapt(model), adapt(twin)
    refuse_other_tokenizer("twin", adapter.model, twin_adapter.model)
    paragraphs = Paragraphs.of(paragraphs, adapter.model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    twin_adapter.check_tokens(paragraphs.inputs, "paragraphs")
    ngram_log_prob = _ngram_log_prob(ngram, adapter.model, paragraphs)
    with bar(2 * len(paragraphs), "counterfactual", progress=progress) as progress_bar:
        options: dict[str, Any] = {"memory_budget": memory_budget, "done": progress_bar.update}
        scores = score_paragraphs(adapter, paragraphs, **options)
        twin_scores = score_paragraphs(twin_adapter, paragraphs, **options)
    texts = [""] * len(paragraphs)
    if adapter.tokenizer is not None:
        texts = paragraphs.texts(adapter.model)
    templates = [
        template_of(ids, text) for ids, text in zip(paragraphs.ids.tolist(), texts, strict=True)
    ]
    twin_provenance = Provenance.of(twin_adapter, {}).model
    return Counterfactual(
        ids=paragraphs.ids,
        n_prefix=paragraphs.n_prefix,
        bos=paragraphs.bos,
        names=paragraphs.names,
        metadata=paragraphs.metadata,
        log_prob=scores.log_prob,
        twin_log_prob=twin_scores.log_prob,
        ngram_log_prob=ngram_log_prob,
        em=scores.em * scores.finite,
        twin_em=twin_scores.em * twin_scores.finite,
        d_vocab=adapter.d_vocab,
        templates=tuple(templates),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            twin=dict(twin_provenance),
            ngram=_ngram_name(ngram),
        ),
        notes=(
            *left_out(scores.finite & twin_scores.finite),
            *group_notes({"given": paragraphs.groups}),
        ),
    )


def _ngram_name(ngram: NGram | None) -> str:
    if ngram is None:
        return "none"
    return ngram.source if isinstance(ngram, UnigramTable) else "a function"


def _ngram_log_prob(
    ngram: NGram | None, model: TokenizerLike, paragraphs: Paragraphs
) -> Float[Tensor, "paragraph pos"]:
    """Log p of every continuation token under the n-gram model, nats; uniform without one."""
    continuation = paragraphs.continuation
    if ngram is None:
        size = float(model.cfg.d_vocab)  # type: ignore[union-attr]
        return torch.full(continuation.shape, -math.log(size))
    if isinstance(ngram, UnigramTable):
        ngram.check(model)
        return ngram.log_prob[continuation]
    if not callable(ngram):
        raise InputError("ngram", repr(ngram), "give a UnigramTable or a function of token ids")
    log_prob = torch.as_tensor(ngram(paragraphs.ids)).float()
    if log_prob.shape != paragraphs.ids.shape or bool((log_prob > 0).any()):
        shape = tuple(log_prob.shape)
        raise InputError(
            "ngram", f"gave {shape}", f"it must give log p <= 0 of {tuple(paragraphs.ids.shape)}"
        )
    return log_prob[:, paragraphs.n_prefix :]
