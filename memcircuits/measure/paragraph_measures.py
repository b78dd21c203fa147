"""The measures of scanned paragraphs, all of which follow from the scores of their tokens.

EM and NLL are the paper's. Greedy decoding, of which EM tells, is only one way to extract text. The
forward pass that gives EM also says what sampling would give (`memcircuits.measure.sampling`): if p
is the probability that one sample is the whole continuation, n samples contain it with probability
1 - (1 - p)^n. It is (n, p)-discoverable (Hayes et al. 2024) when that reaches the p asked for.

Recitations with slips are told by `memcircuits.measure.near_verbatim`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, fraction
from memcircuits.measure.continuation import Continuation
from memcircuits.measure.near_verbatim import (
    NEAR_VERBATIM,
    extraction_strength,
    longest_matches,
    similarities,
)
from memcircuits.measure.recitation_statistics import (
    em_buckets,
    extraction_probability,
    samples_needed,
)


class ParagraphMeasures:
    """The measures of a `Scan`, one number per paragraph; its attributes are those of `Scan`."""

    ids: Tensor
    n_prefix: int
    token_log_prob: Float[Tensor, "paragraph pos"]
    token_correct: Bool[Tensor, "paragraph pos"]
    token_margin: Float[Tensor, "paragraph pos"]
    token_sampled: Float[Tensor, "paragraph pos"] | None
    greedy: Int[Tensor, "paragraph pos"] | None

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

    @property
    def sampled_log_prob(self) -> Tensor:
        """Log-probability that one sample is the continuation, nats, [paragraph].

        It is that of the `sampler` that `scan` was given, by default `log_prob`.
        """
        return (self.token_log_prob if self.token_sampled is None else self.token_sampled).sum(-1)

    def extraction(self, n: int = 1) -> Tensor:
        """Probability that at least one of `n` samples is the continuation, [paragraph].

        Samples are drawn by the `sampler` that `scan` was given.
        """
        return torch.from_numpy(extraction_probability(self.sampled_log_prob.double().numpy(), n))

    def samples_needed(self, p: float = 0.9) -> Tensor:
        """Samples until the whole continuation appears with probability `p`, [paragraph].

        Samples are drawn by the `sampler` that `scan` was given; infinite where none can be it.
        """
        return torch.from_numpy(samples_needed(self.sampled_log_prob.double().numpy(), p))

    def discoverable(self, n: int, p: float = 0.9) -> Tensor:
        """(n, p)-discoverable extraction: n samples contain the continuation, [paragraph]."""
        at_least("n", n, 1)
        return self.samples_needed(p) <= n

    @property
    def extraction_strength(self) -> Tensor:
        """Share of the continuation that is recited from the true beginning, [paragraph].

        See `memcircuits.measure.near_verbatim`, also for the difference to open-unlearning.
        """
        return extraction_strength(self.token_correct)

    @property
    def longest_match(self) -> Tensor | None:
        """Longest run of tokens shared with the greedy continuation, [paragraph]; None without."""
        truth = self.ids[:, self.n_prefix :]
        return None if self.greedy is None else longest_matches(truth, self.greedy)

    @property
    def similarity(self) -> Tensor | None:
        """1 - Levenshtein distance / length of the greedy continuation to the true one.

        In tokens, from 0 to 1, [paragraph]; None if `scan` did not decode.
        """
        truth = self.ids[:, self.n_prefix :]
        return None if self.greedy is None else similarities(truth, self.greedy)

    @property
    def is_near_verbatim(self) -> Tensor | None:
        """A `similarity` of at least 0.9, [paragraph]; None if `scan` did not decode."""
        similarity = self.similarity
        return None if similarity is None else (similarity >= NEAR_VERBATIM) & self.finite

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
        """EM at most a fifth of the continuation (10 of 50), and not near-verbatim, [paragraph]."""
        hardly = (self.em * 5 <= self.token_correct.shape[1]) & self.finite
        near = self.is_near_verbatim
        return hardly if near is None else hardly & ~near
