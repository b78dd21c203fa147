"""An interpolated Kneser-Ney n-gram model: what a model of counts reaches on the same text.

Written with sorted arrays of integer codes because libraries are too slow or too hard to install:
NLTK's `KneserNeyInterpolated` counts the continuations of a context anew for each token that it
scores, which is too slow for millions of tokens, and KenLM estimates models by a program of its own
that must be compiled. The tests compare probabilities with NLTK's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.organism_build.records import read_rows
from memcircuits.organism_build.settings import Record, Settings


class _Order(NamedTuple):
    """Counts of the n-grams of one order.

    An n-gram is one integer: its tokens as the digits of a number in base `vocab_size`, so that
    dividing by `vocab_size` gives its context.
    """

    grams: Int[np.ndarray, " gram"]
    counts: Int[np.ndarray, " gram"]
    discount: float
    contexts: Int[np.ndarray, " context"]
    totals: Float[np.ndarray, " context"]  # sum of the counts after each context
    n_followers: Int[np.ndarray, " context"]  # different tokens after each context


class KneserNey:
    """Interpolated Kneser-Ney model of a token stream (Chen and Goodman 1999, section 2.7).

    Args:
        stream: training tokens.
        vocab_size: number of token ids.
        order: longest n-gram (3: a trigram model).
        discounts: discount of each order, the unigrams' first; by default estimated from the
            numbers of n-grams that occur once and twice.
    """

    def __init__(
        self,
        stream: Int[np.ndarray, " token"],
        vocab_size: int,
        order: int = 3,
        discounts: Sequence[float] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._orders: list[_Order] = []
        stream = stream.astype(np.int64)
        codes = np.zeros(stream.size - order + 1, dtype=np.int64)
        for offset in range(order):
            codes = codes * vocab_size + stream[offset : offset + codes.size]
        for n in range(order, 0, -1):
            grams, counts = np.unique(codes, return_counts=True)
            if discounts is not None:
                discount = discounts[n - 1]
            else:
                once, twice = (counts == 1).sum(), (counts == 2).sum()
                discount = once / (once + 2 * twice) if once else 0.5
            contexts, context_of_gram = np.unique(grams // vocab_size, return_inverse=True)
            totals = np.bincount(context_of_gram, weights=counts)
            n_followers = np.bincount(context_of_gram)
            self._orders.insert(0, _Order(grams, counts, discount, contexts, totals, n_followers))
            # Below the highest order an n-gram counts once for each token that it follows.
            codes = grams % vocab_size ** (n - 1)

    def probabilities(
        self, context: Int[np.ndarray, "n order"], token: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Probability of each token after its context.

        Args:
            context: preceding tokens, fewer than the model's order; the last column is nearest.
            token: tokens.
        """
        p = np.full(token.shape, 1.0 / self.vocab_size)
        code = np.zeros(token.shape, dtype=np.int64)
        for k in range(context.shape[1] + 1):
            if k:
                code = code + context[:, -k].astype(np.int64) * self.vocab_size ** (k - 1)
            order = self._orders[k]
            gram = code * self.vocab_size + token
            i = np.minimum(np.searchsorted(order.grams, gram), order.grams.size - 1)
            count = np.where(order.grams[i] == gram, order.counts[i], 0)
            j = np.minimum(np.searchsorted(order.contexts, code), order.contexts.size - 1)
            kept = np.maximum(count - order.discount, 0)
            interpolated = (kept + order.discount * order.n_followers[j] * p) / order.totals[j]
            # A context that was never seen says nothing: the lower order's probability stands.
            p = np.where(order.contexts[j] == code, interpolated, p)
        return p

    def log_prob(self, rows: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Log p of each token of some rows given those before it, nats.

        The first tokens of a row have a shorter context.
        """
        ids, order = rows.numpy(), len(self._orders)
        columns = [
            np.log(self.probabilities(ids[:, max(0, i - order + 1) : i], ids[:, i]))
            for i in range(ids.shape[1])
        ]
        return torch.from_numpy(np.stack(columns, 1)).float()

    def mean_loss(self, rows: Int[np.ndarray, "batch pos"]) -> float:
        """Mean loss in nats/token, without the first token of each row."""
        order, losses = len(self._orders), []
        for position in range(1, rows.shape[1]):
            context = rows[:, max(0, position - order + 1) : position]
            losses.append(-np.log(self.probabilities(context, rows[:, position])))
        return float(np.mean(losses))


def stage_baseline(work: Path, settings: Settings) -> Record:
    """Losses of n-gram models on the held-out rows that the network is measured on."""
    stream = np.load(work / "stream.npy")
    heldout = read_rows(work / "heldout.jsonl").numpy()
    losses = {}
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        model = KneserNey(stream, settings.vocab_size, order)
        losses[f"{name}_loss"] = round(model.mean_loss(heldout), 4)
    return losses
