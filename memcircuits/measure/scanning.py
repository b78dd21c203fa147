"""Which paragraphs does the model recite? EM, NLL and margins by one forward pass each.

A paragraph is memorized when all continuation tokens are recited (EM = 50 in the paper) and a
control when at most a fifth of them are (EM <= 10 of 50), section 3 of the paper
(arXiv 2403.19851).

Greedy decoding is only one way to extract text. The same forward pass also says what sampling would
give: if p is the probability of the whole continuation, n samples contain it with probability
1 - (1 - p)^n, and it is (n, p)-discoverable (Hayes et al. 2024) when that reaches the p asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, fraction
from memcircuits.core.progress import bar
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.measure.continuation import Continuation, score_paragraphs
from memcircuits.measure.recitation_statistics import (
    REPETITION_COLUMNS,
    by_repetitions,
    em_buckets,
    samples_needed,
)
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Scan(Result, kind="scan"):
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
        bos: ids of the tokens in front of every paragraph.
    """

    ids: Tensor
    n_prefix: int
    names: tuple[str, ...]
    metadata: Mapping[str, tuple[Any, ...]]
    token_log_prob: Float[Tensor, "paragraph pos"]
    token_correct: Bool[Tensor, "paragraph pos"]
    token_margin: Float[Tensor, "paragraph pos"]
    provenance: Provenance
    bos: tuple[int, ...] = ()

    former_names: ClassVar[Mapping[str, str]] = {"facts": "metadata"}

    @classmethod
    def of(cls, paragraphs: Paragraphs, scores: Continuation, provenance: Provenance) -> Scan:
        """Paragraphs and the scores of their continuations."""
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
        )

    @cached_property
    def paragraphs(self) -> Paragraphs:
        """All paragraphs scanned."""
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names), self.metadata, self.bos)

    @property
    def _continuation(self) -> Continuation:
        return Continuation(self.token_log_prob, self.token_correct, self.token_margin)

    @property
    def em(self) -> Tensor:
        """Tokens recited before the first mismatch, [paragraph]; 0 where not finite."""
        return self._continuation.em * self.finite

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood of the continuation, nats/token, [paragraph]."""
        return self._continuation.nll

    @property
    def log_prob(self) -> Tensor:
        """Log-probability of the whole continuation, nats, [paragraph]."""
        return self.token_log_prob.sum(-1)

    @property
    def bits(self) -> Tensor:
        """Bits that the continuation costs to encode with the model: -log2 p, [paragraph]."""
        return -self.log_prob / math.log(2)

    def min_k(self, share: float = 0.2) -> Tensor:
        """Mean log p of the `share` least likely continuation tokens, nats, [paragraph].

        Min-K % (Shi et al. 2024), high for text seen in training; here over the continuation only.
        """
        fraction("share", share)
        k = max(1, round(share * self.token_log_prob.shape[1]))
        return self.token_log_prob.topk(k, dim=-1, largest=False).values.mean(-1)

    @property
    def loose_match(self) -> Tensor:
        """Share of continuation tokens that are the greedy choice, given the true tokens before.

        Unlike EM it also counts tokens after the first mismatch; in [0, 1], [paragraph].
        """
        return self.token_correct.float().mean(-1)

    def extractable(self, k: int) -> Tensor:
        """Whether the first `k` continuation tokens are recited from the prefix, [paragraph].

        With prefixes of k tokens this is k-extractability: Biderman et al. 2023 use k = 32,
        lm-extraction-benchmark 50, OLMo 64.

        Raises:
            InputError: if the continuation has fewer than `k` tokens.
        """
        at_least("k", k, 1)
        if k > self.token_correct.shape[1]:
            raise InputError("k", k, f"the continuation has {self.token_correct.shape[1]} tokens")
        return self.em >= k

    def samples_needed(self, p: float = 0.9) -> Tensor:
        """Samples until the whole continuation appears with probability `p`, [paragraph]."""
        return torch.from_numpy(samples_needed(self.log_prob.double().numpy(), p))

    def discoverable(self, n: int, p: float = 0.9) -> Tensor:
        """(n, p)-discoverable extraction: n samples contain the continuation, [paragraph]."""
        at_least("n", n, 1)
        return self.samples_needed(p) <= n

    @property
    def buckets(self) -> list[str]:
        """The paper's bucket of each paragraph: `0-10`, `11-29`, `30-49` and `50` of 50 tokens."""
        return em_buckets(self.em.numpy(), self.token_correct.shape[1])

    @property
    def margin(self) -> Tensor:
        """Smallest top-2 logit margin over the recited tokens and the first mismatch."""
        position = torch.arange(self.token_margin.shape[1])
        decided = position <= self.em[:, None]
        return self.token_margin.masked_fill(~decided, float("inf")).amin(-1)

    @property
    def finite(self) -> Tensor:
        """Whether all scores of a paragraph are finite; other paragraphs are never ranked."""
        return self._continuation.finite

    @property
    def is_memorized(self) -> Tensor:
        """EM equals the length of the continuation, [paragraph]."""
        return self.em == self.token_correct.shape[1]

    @property
    def is_control(self) -> Tensor:
        """EM at most a fifth of the continuation (10 of 50), [paragraph]."""
        return (self.em * 5 <= self.token_correct.shape[1]) & self.finite

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

        Columns `id, em, nll, log_prob, margin, bits, loose_match, min_k, samples, bucket,
        memorized, finite`; `samples` are those needed for a probability of 0.9. A fact that has
        the name of a measure is called `given_...`.
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
            "samples": self.samples_needed().numpy(),
            "bucket": self.buckets,
            "memorized": self.is_memorized.numpy(),
            "finite": self.finite.numpy(),
        }
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

    def __str__(self) -> str:
        return (
            f"{len(self.names)} paragraphs, {int(self.is_memorized.sum())} memorized, "
            f"{int(self.is_control.sum())} controls"
        )


def scan(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Scan:
    """Measure how much of each paragraph the model recites.

    Args:
        model: the model.
        paragraphs: the paragraphs.
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
            done=progress_bar.update,
        )
    return Scan.of(paragraphs, scores, Provenance.of(adapter, {"paragraphs": paragraphs}))


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
