"""Which paragraphs does the model recite? EM, NLL and margins by one forward pass each.

A paragraph is memorized when all continuation tokens are recited (EM = 50 in the paper) and a
control when at most a fifth of them are (EM <= 10 of 50), section 3 of the paper.

Greedy decoding is one way to extract text among many, so the same pass also answers what sampling
would give. If p is the probability of the whole continuation, n samples contain it with probability
1 - (1 - p)^n: it is (n, p)-discoverable (Hayes et al. 2024) when that reaches the p asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, fraction
from memcircuits.core.progress import bar
from memcircuits.core.statistics import left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import Continuation, score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


COUNTS = ("repetitions", "count", "duplicates")


@dataclass(frozen=True)
class Scan(Result, kind="scan"):
    """How the model takes each paragraph.

    Attributes:
        ids: token ids [paragraph, pos].
        n_prefix: tokens of the prefix.
        names: one per paragraph.
        metadata: the paragraphs' further columns.
        token_log_prob: log p of each continuation token, nats, [paragraph, pos].
        token_correct: whether it is the greedy choice, [paragraph, pos].
        token_margin: top-2 logit margin, [paragraph, pos].
        provenance: where the numbers come from.
    """

    ids: Tensor
    n_prefix: int
    names: tuple[str, ...]
    metadata: Mapping[str, tuple[Any, ...]]
    token_log_prob: Float[Tensor, "paragraph pos"]
    token_correct: Bool[Tensor, "paragraph pos"]
    token_margin: Float[Tensor, "paragraph pos"]
    provenance: Provenance

    former_names: ClassVar[Mapping[str, str]] = {"facts": "metadata"}

    @cached_property
    def paragraphs(self) -> Paragraphs:
        """All paragraphs scanned."""
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names), self.metadata)

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
        """Share of continuation tokens that are the greedy choice after the true ones before them.

        Unlike EM it goes on after a mismatch; in [0, 1], [paragraph].
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
        return buckets(self.em.numpy(), self.token_correct.shape[1])

    @property
    def margin(self) -> Tensor:
        """Smallest top-2 logit margin over the recited tokens and the first mismatch."""
        position = torch.arange(self.token_margin.shape[1])
        decided = position <= self.em[:, None]
        return self.token_margin.masked_fill(~decided, float("inf")).amin(-1)

    @property
    def finite(self) -> Tensor:
        """Whether all numbers of a paragraph are finite; others are never ranked."""
        return self.token_log_prob.isfinite().all(-1) & self.token_margin.isfinite().all(-1)

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
        """The memorized paragraphs, None if there is none."""
        return self.paragraphs[self.is_memorized] if self.is_memorized.any() else None

    @property
    def control(self) -> Paragraphs | None:
        """The paragraphs hardly recited, None if there is none."""
        return self.paragraphs[self.is_control] if self.is_control.any() else None

    def to_frame(self) -> pd.DataFrame:
        """The measures, one row a paragraph, and the metadata.

        Columns `id, em, nll, log_prob, margin, bits, loose_match, min_k, samples, bucket,
        memorized, finite`; `samples` are those needed for a probability of 0.9. A fact that bears
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

        Columns `repetitions, n, em, em_se, nll, nll_se, memorized`. More than 20 different counts
        are grouped by powers of two (8 stands for 8 to 15).

        Raises:
            InputError: if the paragraphs do not say how often they were seen, in a column
                `repetitions`, `count` or `duplicates`.
        """
        return by_repetitions(self.to_frame())

    def figure(self) -> Any:
        """The duplication curve where counts are known, else EM against NLL (plotly)."""
        from memcircuits.display import figures

        if any(key in self.metadata for key in COUNTS):
            frame = self.by_repetitions()
            return figures.duplication_curve(frame[frame["repetitions"] > 0], title=str(self))
        return figures.em_against_nll(self.to_frame(), title=str(self))

    def __str__(self) -> str:
        return (
            f"{len(self.names)} paragraphs, {int(self.is_memorized.sum())} memorized, "
            f"{int(self.is_control.sum())} controls"
        )


def scan(
    model: Any,
    paragraphs: Any,
    *,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Scan:
    """Measure how much of each paragraph the model recites.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        batch_size: paragraphs per forward pass; by default as many as fit.
        memory_budget: bytes that one forward pass may take.
        progress: show a bar on stderr.

    Returns:
        A `Scan`; paragraphs with non-finite numbers are marked in `Scan.finite`.

    Raises:
        InputError: for paragraphs that the model cannot take.

    Example:
        >>> found = mc.scan(model, memorized + control)
        >>> print(found)
        8 paragraphs, 4 memorized, 4 controls
        >>> found.em[:4].tolist()
        [50, 50, 50, 50]
    """
    if batch_size is not None:
        at_least("batch_size", batch_size, 1)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    size = batch_size or rows_that_fit(
        adapter, paragraphs.ids.shape[1], paragraphs.n_continuation, memory_budget
    )
    with bar(len(paragraphs), "scan", progress=progress) as shown:
        return measured(
            adapter,
            paragraphs,
            size,
            Provenance.of(adapter, {"paragraphs": paragraphs}),
            shown.update,
        )


def measured(
    adapter: Adapter,
    paragraphs: Paragraphs,
    batch_size: int,
    provenance: Provenance,
    done: Callable[[int], None] | None = None,
) -> Scan:
    """`scan` without its checks: what both it and scans of corpora do with paragraphs."""

    def one_batch(piece: slice) -> Tensor:
        scores = score_continuation(adapter, paragraphs, piece)
        return torch.stack([scores.log_prob, scores.correct.float(), scores.margin], 1).cpu()

    with adapter.preserving_state():
        found = map_batches(len(paragraphs), batch_size, one_batch, done)
    return Scan(
        ids=paragraphs.ids,
        n_prefix=paragraphs.n_prefix,
        names=paragraphs.names,
        metadata=paragraphs.metadata,
        token_log_prob=found[:, 0].contiguous(),
        token_correct=found[:, 1] > 0.5,
        token_margin=found[:, 2].contiguous(),
        provenance=provenance,
    )


def without_non_finite(
    adapter: Adapter,
    paragraphs: Paragraphs,
    argument: str = "paragraphs",
    memory_budget: int | None = None,
) -> tuple[Paragraphs, tuple[str, ...]]:
    """Paragraphs with finite numbers, and a note about the others: sums must not meet these.

    Raises:
        InputError: if none is left.
    """
    size = rows_that_fit(adapter, paragraphs.ids.shape[1], paragraphs.n_continuation, memory_budget)
    finite = measured(adapter, paragraphs, size, Provenance({}, {}, {}, {})).finite
    if not finite.any():
        raise InputError(
            argument, "non-finite logits on every paragraph", "load the model in float32"
        )
    return (paragraphs if finite.all() else paragraphs[finite]), left_out(finite)


def samples_needed(log_prob: Float[np.ndarray, " row"], p: float) -> Float[np.ndarray, " row"]:
    """Rounded up log(1 - p) / log(1 - exp(log_prob)); infinite below about exp(-745)."""
    if not 0 < p < 1:
        raise InputError("p", p, "give a probability between 0 and 1")
    one = np.minimum(np.exp(log_prob), 1.0)
    with np.errstate(divide="ignore"):
        return np.maximum(1.0, np.ceil(np.log1p(-p) / np.log1p(-one)))


def buckets(em: np.ndarray, n_continuation: int) -> list[str]:
    """The paper's buckets, at a fifth, three fifths and all of the continuation."""
    n = n_continuation
    edges = [-1, n // 5, (3 * n - 1) // 5, n - 1, n]
    names = [f"{low + 1}-{high}" for low, high in pairwise(edges[:-1])] + [str(n)]
    return [names[i] for i in np.searchsorted(edges[1:], em)]


def by_repetitions(frame: pd.DataFrame) -> pd.DataFrame:
    """See `Scan.by_repetitions`; `frame` is what `Scan.to_frame` gives."""
    key = next((key for key in COUNTS if key in frame), None)
    if key is None:
        raise InputError(
            "paragraphs", f"no column {' or '.join(COUNTS)}", "the duplication curve needs counts"
        )
    counts = frame[key]
    if not np.issubdtype(counts.dtype, np.number):
        raise InputError("paragraphs", f"{key} holds no numbers", "give counts")
    if counts.nunique() > 20:
        counts = np.exp2(np.floor(np.log2(counts.where(counts > 0)))).fillna(0).astype(int)
    groups = frame.assign(repetitions=counts).groupby("repetitions")
    return groups.agg(
        n=("em", "size"),
        em=("em", "mean"),
        em_se=("em", "sem"),
        nll=("nll", "mean"),
        nll_se=("nll", "sem"),
        memorized=("memorized", "sum"),
    ).reset_index()
