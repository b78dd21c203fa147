"""Exact match, negative log-likelihood and margins of a continuation from one forward pass.

Greedy decoding and teacher forcing see the same tokens up to the first wrong one. The number of
greedily decoded tokens before the first mismatch (exact match, EM) can therefore be read from the
argmax of one teacher-forced pass, and nothing has to be decoded. Log-probabilities are computed in
float32 whatever the model's type.

Every analysis comes through here, from the whole to the part:

* `score_paragraphs` scores any number of paragraphs, batch by batch;
* `score_continuation` scores one batch, `continuation_logits` and `continuation_log_probs` give
  its logits and log-probabilities;
* `run_to_continuation` is the forward pass itself, for callers that also read activations;
* `read_continuation` turns logits into scores, `log_odds` into scores that are not flat where a
  token is certain; `kl_divergence` compares two distributions.

The vocabulary is by far the longest axis: after the matrix products, reading the logits is what
takes time. `read_continuation` therefore works on blocks that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.sampling import Sampler
from memcircuits.models.adapter import Adapter, Run
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import ActivationEdit

Measured: TypeAlias = Literal["nll", "log-odds"]
"""What a first-order estimate of harm is made of."""

_VOCAB_BLOCK = 256  # tokens
_CACHED_LOGITS = 2**22


@dataclass(frozen=True)
class Continuation:
    """Per-token scores of the true continuation.

    Attributes:
        log_prob: log p of every continuation token given all tokens before it, nats.
        correct: whether the token is the greedy choice.
        margin: largest minus second largest logit; near 0, greedy choices are fragile.
        sampled: log p of every token where it is drawn by a `Sampler`, nats; None without one.
    """

    log_prob: Float[Tensor, "batch pos"]
    correct: Bool[Tensor, "batch pos"]
    margin: Float[Tensor, "batch pos"]
    sampled: Float[Tensor, "batch pos"] | None = None

    @property
    def em(self) -> Int[Tensor, " batch"]:
        """Number of greedy tokens equal to the truth before the first mismatch."""
        return self.correct.long().cumprod(-1).sum(-1)

    @property
    def nll(self) -> Float[Tensor, " batch"]:
        """Mean negative log-likelihood, nats/token."""
        return -self.log_prob.mean(-1)

    @property
    def finite(self) -> Bool[Tensor, " batch"]:
        """Whether all scores of a paragraph are finite."""
        return self.log_prob.isfinite().all(-1) & self.margin.isfinite().all(-1)


def run_to_continuation(
    adapter: Adapter,
    paragraphs: Paragraphs,
    batch: slice | Tensor = slice(None),
    *,
    read: Sequence[str] = (),
    edit: Mapping[str, ActivationEdit] | None = None,
) -> Run:
    """One forward pass on whole paragraphs, unembedded only where it predicts the continuation.

    The model reads `Paragraphs.inputs`, the tokens in front of a paragraph too. The token at
    position i is predicted at position i - 1. The logits of the continuation therefore begin at the
    last prefix token, and the last token, which predicts nothing, is not run.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        batch: which of them.
        read: names of the activations to return. Their first `Paragraphs.n_bos` positions are those
            of the tokens in front.
        edit: activation name -> function from the activation to its replacement, likewise.
    """
    positions = slice(paragraphs.n_given - 1, None)
    return adapter.run(paragraphs.inputs[batch, :-1], positions=positions, read=read, edit=edit)


def continuation_logits(
    adapter: Adapter,
    paragraphs: Paragraphs,
    batch: slice | Tensor = slice(None),
    *,
    edit: Mapping[str, ActivationEdit] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits that predict the continuation tokens of some paragraphs, given all tokens before.

    Arguments as `run_to_continuation`.
    """
    return run_to_continuation(adapter, paragraphs, batch, edit=edit).logits


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
    """Per-token scores of some paragraphs' continuations; arguments as `run_to_continuation`."""
    logits = continuation_logits(adapter, paragraphs, batch, edit=edit)
    return read_continuation(logits, paragraphs.continuation[batch].to(logits.device))


def score_paragraphs(
    adapter: Adapter,
    paragraphs: Paragraphs,
    *,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    sampler: Sampler | None = None,
    done: Callable[[int], None] | None = None,
) -> Continuation:
    """Per-token scores of all paragraphs, batch by batch, on the CPU; arguments are not checked.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        sampler: how text is drawn, if `Continuation.sampled` is asked for.
        batch_size: paragraphs per forward pass; by default as many as fit.
        memory_budget: maximum bytes per batch.
        done: called with the number of paragraphs after each batch.
    """

    def one_batch(batch: slice) -> Float[Tensor, "batch score pos"]:
        logits = continuation_logits(adapter, paragraphs, batch)
        targets = paragraphs.continuation[batch].to(logits.device)
        scores = read_continuation(logits, targets)
        columns = [scores.log_prob, scores.correct.float(), scores.margin]
        if sampler is not None:
            columns.append(sampler.log_prob(logits, targets))
        return torch.stack(columns, 1).cpu()

    size = batch_size or rows_that_fit(
        adapter, paragraphs.inputs.shape[1], paragraphs.n_continuation, memory_budget
    )
    with adapter.preserving_state():
        scores = map_batches(len(paragraphs), size, one_batch, done)
    log_prob, correct, margin, *sampled = (column.contiguous() for column in scores.unbind(1))
    return Continuation(log_prob, correct > 0.5, margin, *sampled)


def read_continuation(
    logits: Float[Tensor, "batch pos d_vocab"],
    targets: Int[Tensor, "batch pos"],
) -> Continuation:
    """Score `targets` under logits that predict them (same positions)."""
    n_pos, d_vocab = targets.shape[1], logits.shape[-1]
    # On a CPU the intermediate results of a block stay in the cache; a GPU is faster with all rows.
    size = max(1, len(logits) if logits.is_cuda else _CACHED_LOGITS // (n_pos * d_vocab))
    blocks = []
    for block, block_targets in zip(logits.split(size), targets.split(size), strict=True):
        block = block.float()
        nll = torch.nn.functional.cross_entropy(
            block.reshape(-1, d_vocab), block_targets.reshape(-1), reduction="none"
        )
        greedy, margin = largest_two(block.detach())
        blocks.append((-nll.view(block_targets.shape), greedy == block_targets, margin))
    log_prob, correct, margin = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Continuation(log_prob, correct, margin)


def log_odds(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Mean of log(p / (1 - p)) of `targets`, nats/token.

    Where p is near 1 the NLL is flat, and log-odds are not. They are read from the logits, because
    1 - p is rounded to 0 there.
    """
    logits, targets = logits.float(), targets[..., None]
    others = logits.scatter(-1, targets, -torch.inf).logsumexp(-1)
    return (logits.gather(-1, targets)[..., 0] - others).mean(-1)


def harm(
    measured: Measured,
    logits: Float[Tensor, "batch pos d_vocab"],
    targets: Int[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """What rises when the recitation is harmed: the NLL, or minus the log-odds; nats/token."""
    if measured == "nll":
        return read_continuation(logits, targets).nll
    return -log_odds(logits, targets)


def kl_divergence(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) of two distributions given as log-probabilities, nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def largest_two(
    logits: Float[Tensor, "*batch d_vocab"],
) -> tuple[Int[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Index of the largest logit (the first of equals), and its distance to the second largest.

    On CPUs the largest *value* is found ten times faster than its index. The vocabulary is
    therefore cut into blocks: first the largest value of every block, then the index within the
    first block whose maximum is the largest.
    """
    d_vocab = logits.shape[-1]
    # Maxima of the full blocks, of the incomplete last one, and -inf so that there are two.
    n_full = d_vocab // _VOCAB_BLOCK * _VOCAB_BLOCK
    maxima = logits[..., :n_full].unflatten(-1, (n_full // _VOCAB_BLOCK, _VOCAB_BLOCK)).amax(-1)
    if n_full < d_vocab:
        maxima = torch.cat([maxima, logits[..., n_full:].amax(-1, keepdim=True)], -1)
    maxima = torch.nn.functional.pad(maxima, (0, 1), value=-torch.inf)
    # The logits of the block that holds the largest one.
    start = maxima.argmax(-1, keepdim=True) * _VOCAB_BLOCK
    indices = start + torch.arange(_VOCAB_BLOCK, device=logits.device)
    values = logits.gather(-1, indices.clamp_max(d_vocab - 1))
    values = values.masked_fill(indices >= d_vocab, -torch.inf)
    # The second largest is in the same block, or is the largest of another one.
    inside, across = values.topk(2).values, maxima.topk(2).values
    margin = inside[..., 0] - torch.maximum(inside[..., 1], across[..., 1])
    return start[..., 0] + values.argmax(-1), margin
