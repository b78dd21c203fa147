"""Exact match, negative log-likelihood and margins of a continuation from one forward pass.

Greedy decoding and teacher forcing see the same tokens until the first wrong one, so the number of
greedily decoded tokens that match before the first mismatch (EM) is read off the teacher-forced
argmax: nothing is decoded. Log-probabilities are float32 whatever the model's type.

The vocabulary is by far the longest axis: after the matrix products, reading it is what takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.models.adapter import Adapter, Run
from memcircuits.models.hooks import ActivationEdit

_BLOCK = 256  # tokens
_PIECE = 2**22  # logits


@dataclass(frozen=True)
class Continuation:
    """Per-token scores of the true continuation.

    Attributes:
        log_prob: log p of every continuation token given all before it, nats.
        correct: whether the token is the greedy choice.
        margin: largest minus second largest logit; near 0, greedy choices are fragile.
    """

    log_prob: Float[Tensor, "batch pos"]
    correct: Bool[Tensor, "batch pos"]
    margin: Float[Tensor, "batch pos"]

    @property
    def em(self) -> Int[Tensor, " batch"]:
        """Greedy tokens equal to the truth before the first mismatch."""
        return self.correct.long().cumprod(-1).sum(-1)

    @property
    def nll(self) -> Float[Tensor, " batch"]:
        """Mean negative log-likelihood, nats/token."""
        return -self.log_prob.mean(-1)


def read_continuation(
    logits: Float[Tensor, "batch pos d_vocab"],
    targets: Int[Tensor, "batch pos"],
) -> Continuation:
    """Score `targets` under logits that predict them (same positions)."""
    n_pos, d_vocab = targets.shape[1], logits.shape[-1]
    pieces = []
    # On CPUs what is made of a piece stays in the cache; a GPU is quicker with everything at once.
    size = max(1, len(logits) if logits.is_cuda else _PIECE // (n_pos * d_vocab))
    for piece, true in zip(logits.split(size), targets.split(size), strict=True):
        piece = piece.float()
        nll = torch.nn.functional.cross_entropy(
            piece.reshape(-1, d_vocab), true.reshape(-1), reduction="none"
        )
        found, gap = largest_two(piece.detach())
        pieces.append((-nll.view(true.shape), found == true, gap))
    log_prob, correct, gaps = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Continuation(log_prob, correct, gaps)


def run_to_continuation(
    adapter: Adapter,
    ids: Int[Tensor, "batch pos"],
    n_prefix: int,
    *,
    read: Sequence[str] = (),
    edit: Mapping[str, ActivationEdit] | None = None,
) -> Run:
    """One forward pass on whole paragraphs, unembedded only where it predicts the continuation.

    The last token predicts nothing and is not run. The token at position i is predicted at
    position i - 1, so the logits of the continuation begin at the last prefix token.

    Args:
        adapter: the model.
        ids: prefix and continuation.
        n_prefix: number of tokens of the prefix.
        read: names of the activations to return.
        edit: activation name -> function from the activation to its replacement.
    """
    return adapter.run(ids[:, :-1], positions=slice(n_prefix - 1, None), read=read, edit=edit)


def continuation_logits(
    adapter: Adapter,
    paragraphs: Paragraphs,
    batch: slice | Tensor = slice(None),
    *,
    edit: Mapping[str, ActivationEdit] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits that predict the continuation tokens of some paragraphs, given all tokens before.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        batch: which of them.
        edit: activation name -> function from the activation to its replacement.
    """
    return run_to_continuation(
        adapter, paragraphs.ids[batch], paragraphs.n_prefix, edit=edit
    ).logits


def continuation_log_probs(
    adapter: Adapter, paragraphs: Paragraphs, batch: slice | Tensor = slice(None)
) -> Float[Tensor, "batch pos d_vocab"]:
    """Log-probabilities (nats) of every token of the vocabulary at the continuation's positions."""
    return continuation_logits(adapter, paragraphs, batch).float().log_softmax(-1)


def score_continuation(
    adapter: Adapter,
    paragraphs: Paragraphs,
    batch: slice | Tensor = slice(None),
    *,
    edit: Mapping[str, ActivationEdit] | None = None,
) -> Continuation:
    """Per-token scores of some paragraphs' continuations; arguments as `continuation_logits`."""
    logits = continuation_logits(adapter, paragraphs, batch, edit=edit)
    return read_continuation(logits, paragraphs.continuation[batch].to(logits.device))


def kl_divergence(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) of two distributions given as log-probabilities, nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def largest_two(
    logits: Float[Tensor, "*batch d_vocab"],
) -> tuple[Int[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Where the largest logit is (the first such place), and how far the second largest is below.

    On CPUs the largest *value* is found ten times sooner than its place. So: the largest value of
    every block of the vocabulary, and places within the first block that has the largest of these.
    """
    d_vocab = logits.shape[-1]
    n = d_vocab // _BLOCK * _BLOCK
    blocks = logits[..., :n].unflatten(-1, (n // _BLOCK, _BLOCK)).amax(-1)
    rest = logits[..., n:].amax(-1, keepdim=True) if n < d_vocab else blocks[..., :0]
    blocks = torch.nn.functional.pad(torch.cat([blocks, rest], -1), (0, 1), value=-torch.inf)
    start = blocks.argmax(-1, keepdim=True) * _BLOCK
    places = start + torch.arange(_BLOCK, device=logits.device)
    values = logits.gather(-1, places.clamp_max(d_vocab - 1))
    values = values.masked_fill(places >= d_vocab, -torch.inf)
    inside, across = values.topk(2).values, blocks.topk(2).values
    gap = inside[..., 0] - torch.maximum(inside[..., 1], across[..., 1])
    return start[..., 0] + values.argmax(-1), gap
