"""TODO."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memcircuits.organism_build.files import read_rows
from memcircuits.organism_build.settings import Record, Settings


class KneserNey:
    """Interpolated Kneser-Ney model of a token stream, one discount an order.

    Args:
        stream: Training tokens, [token].
        vocab_size: Number of token ids.
        order: Longest n-gram (3: a trigram model).
    """

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int = 3) -> None:
        self.vocab_size = vocab_size
        self.levels: list[tuple] = []
        stream = stream.astype(np.int64)
        codes = np.zeros(stream.size - order + 1, dtype=np.int64)
        for offset in range(order):
            codes = codes * vocab_size + stream[offset : offset + codes.size]
        for n in range(order, 0, -1):
            # Below the highest order an n-gram counts once for each token it was seen to follow.
            grams, counts = np.unique(codes, return_counts=True)
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            discount = once / (once + 2 * twice) if once else 0.5
            contexts, where = np.unique(grams // vocab_size, return_inverse=True)
            totals = np.bincount(where, weights=counts)
            self.levels.insert(0, (grams, counts, discount, contexts, totals, np.bincount(where)))
            codes = grams % vocab_size ** (n - 1)

    def probabilities(self, context: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Probability of each token after its context.

        Args:
            context: Preceding tokens, [n, k] with k below the order; the last column is nearest.
            token: Tokens, [n].

        Returns:
            Probabilities, [n].
        """
        p = np.full(token.shape, 1.0 / self.vocab_size)
        code = np.zeros(token.shape, dtype=np.int64)
        for k in range(context.shape[1] + 1):
            if k:
                code = code + context[:, -k].astype(np.int64) * self.vocab_size ** (k - 1)
            grams, counts, discount, contexts, totals, kinds = self.levels[k]
            gram = code * self.vocab_size + token
            i = np.minimum(np.searchsorted(grams, gram), grams.size - 1)
            count = np.where(grams[i] == gram, counts[i], 0)
            j = np.minimum(np.searchsorted(contexts, code), contexts.size - 1)
            mixed = (np.maximum(count - discount, 0) + discount * kinds[j] * p) / totals[j]
            p = np.where(contexts[j] == code, mixed, p)
        return p

    def mean_loss(self, rows: np.ndarray) -> float:
        """Mean loss in nats/token of rows [batch, pos], without the first token of each."""
        order, losses = len(self.levels), []
        for position in range(1, rows.shape[1]):
            context = rows[:, max(0, position - order + 1) : position]
            losses.append(-np.log(self.probabilities(context, rows[:, position])))
        return float(np.mean(losses))


def stage_baseline(work: Path, settings: Settings) -> Record:
    """Losses of n-gram models on the held-out rows that the network is measured on."""
    stream = np.load(work / "stream.npy")
    heldout = read_rows(work / "heldout.jsonl").numpy()
    names = ("unigram", "bigram", "trigram")
    return {
        f"{name}_loss": round(KneserNey(stream, settings.vocab_size, n).mean_loss(heldout), 4)
        for n, name in enumerate(names, start=1)
    }
