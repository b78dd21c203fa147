"""Exact match, negative log-likelihood and margins of a continuation from one forward pass.

Greedy decoding and teacher forcing see the same tokens until the first wrong one, so the number of
greedily decoded tokens that match before the first mismatch (EM) is read off the teacher-forced
argmax: nothing is decoded. Log-probabilities are float32 whatever the model's type.

The vocabulary is by far the longest axis: after the matrix products, reading it is what takes time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BLOCK = 256


@dataclass(frozen=True)
class Continuation:
    """How a model takes the true continuation.

    Attributes:
        log_prob: log p of every continuation token given all before it, nats.
        correct: whether the token is the greedy choice.
        margin: largest minus second largest logit; near 0, greedy choices are fragile.
    """

    log_prob: Float[Tensor, "row pos"]
    correct: Bool[Tensor, "row pos"]
    margin: Float[Tensor, "row pos"] | None = None

    @property
    def em(self) -> Int[Tensor, " row"]:
        """Greedy tokens equal to the truth before the first mismatch."""
        return self.correct.long().cumprod(-1).sum(-1)

    @property
    def nll(self) -> Float[Tensor, " row"]:
        """Mean negative log-likelihood, nats/token."""
        return -self.log_prob.mean(-1)


def read_continuation(
    logits: Float[Tensor, "row pos d_vocab"],
    targets: Int[Tensor, "row pos"],
    *,
    margin: bool = False,
) -> Continuation:
    """Score `targets` under logits that predict them (same positions)."""
    logits = logits.float()
    rows, n_pos, d_vocab = logits.shape
    log_prob = -torch.nn.functional.cross_entropy(
        logits.reshape(-1, d_vocab), targets.reshape(-1), reduction="none"
    ).view(rows, n_pos)
    if margin:
        top = logits.topk(2, dim=-1)
        return Continuation(
            log_prob, top.indices[..., 0] == targets, top.values[..., 0] - top.values[..., 1]
        )
    return Continuation(log_prob, greedy(logits) == targets)


def greedy(logits: Float[Tensor, "*batch d_vocab"]) -> Int[Tensor, "*batch"]:
    """The first index of the largest logit, as `argmax` gives it.

    On CPUs the largest *value* is found ten times sooner than its place. So: the largest value of
    every block, the first block that has the largest of these, and the place in that block alone.
    """
    logits = logits.detach()
    n = logits.shape[-1] // _BLOCK * _BLOCK
    if not n:
        return logits.argmax(-1)
    blocks = logits[..., :n].unflatten(-1, (-1, _BLOCK))
    best = blocks.amax(-1)
    block = best.argmax(-1, keepdim=True)
    place = blocks.take_along_dim(block[..., None], -2)[..., 0, :].argmax(-1)
    place += block[..., 0] * _BLOCK
    if n == logits.shape[-1]:
        return place
    rest = logits[..., n:].max(-1)
    return torch.where(rest.values > best.amax(-1), rest.indices + n, place)
