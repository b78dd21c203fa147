"""Numbers of a model on each paragraph: how sure it is, and what its hidden states look like.

The hidden states are those of the residual stream before every block and after the last one, at
the last prefix token and as a mean over the continuation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.triggers.replacements import choose_tokens
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches, rows_that_fit
from memcircuits.models.hooks import hook_name

PLACES = ("last prefix token", "continuation")
"""Where hidden states are read."""

PROBABILITY = ("p mean", "p variance", "entropy", "margin", "NLL")
"""Of the continuation tokens: mean and variance of p, entropy (nats), top-2 logit margin, NLL."""


@dataclass(frozen=True)
class ModelFeatures:
    """What a model computes on some paragraphs.

    Attributes:
        probability: [paragraph, feature], see `PROBABILITY`.
        states: hidden states, [paragraph, place, layer, d_model]; `layer` counts from the
            embedding, 0, to the output of the last block.
        norm: their length, [paragraph, place, layer]; over the continuation, the mean of lengths.
        variance: their variance over d_model, likewise.
        stability: cosine of the state at the last prefix token with what it is when one other
            prefix token is replaced at random, mean over replacements, [paragraph, layer].
    """

    probability: Float[Tensor, "paragraph feature"]
    states: Float[Tensor, "paragraph place layer d_model"]
    norm: Float[Tensor, "paragraph place layer"]
    variance: Float[Tensor, "paragraph place layer"]
    stability: Float[Tensor, "paragraph layer"]


def model_features(
    adapter: Adapter,
    paragraphs: Paragraphs,
    replacements: int,
    seed: int,
    memory_budget: int | None,
    done: Callable[[int], None],
) -> ModelFeatures:
    """Run the model on paragraphs, and on their prefixes with one token replaced.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        replacements: number of replacements of each paragraph.
        seed: of their places and tokens.
        memory_budget: maximum bytes per batch.
        done: called with the number of paragraphs after each batch.
    """
    changed = _with_one_token_replaced(adapter, paragraphs, replacements, seed, memory_budget)

    def one_batch(batch: slice) -> tuple[Tensor, ...]:
        return _one_batch(adapter, paragraphs, changed, batch)

    size = rows_that_fit(
        adapter, paragraphs.inputs.shape[1], paragraphs.n_continuation, memory_budget
    )
    parts = []
    for batch, values in iter_batches(len(paragraphs), size, one_batch):
        parts.append([value.float().cpu() for value in values])
        done(batch.stop - batch.start)
    return ModelFeatures(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _names(adapter: Adapter) -> list[str]:
    names = [hook_name("resid_pre", layer) for layer in range(adapter.n_layers)]
    return [*names, hook_name("resid_post", adapter.n_layers - 1)]


def _one_batch(
    adapter: Adapter,
    paragraphs: Paragraphs,
    changed: Int[Tensor, "paragraph draw pos"],
    batch: slice,
) -> tuple[Tensor, ...]:
    names, last = _names(adapter), paragraphs.n_given - 1
    run = adapter.run(paragraphs.inputs[batch], positions=slice(last, None), read=names)
    residual = torch.stack([run.cache[name][:, last:].float() for name in names], 1)
    logits = run.logits[:, :-1].float()
    targets = paragraphs.continuation[batch].to(logits.device)
    scores = read_continuation(logits, targets)
    log_p = logits.log_softmax(-1)
    p, entropy = scores.log_prob.exp(), -(log_p.exp() * log_p).sum(-1)
    probability = [p.mean(-1), p.var(-1, unbiased=False), entropy.mean(-1)]
    probability += [scores.margin.mean(-1), scores.nll]
    # The last prefix token is the first of these positions, the continuation all others.
    parts = (residual[:, :, :1], residual[:, :, 1:])
    states = torch.stack([part.mean(2) for part in parts], 1)
    norm = torch.stack([part.norm(dim=-1).mean(2) for part in parts], 1)
    variance = torch.stack([part.var(-1, unbiased=False).mean(2) for part in parts], 1)
    stability = []
    for rows in changed[batch].unbind(1):
        cache = adapter.run(rows, positions=slice(-1, None), read=names).cache
        after = torch.stack([cache[name][:, -1].float() for name in names], 1)
        stability.append(torch.cosine_similarity(states[:, 0], after, dim=-1))
    return torch.stack(probability, -1), states, norm, variance, torch.stack(stability).mean(0)


def _with_one_token_replaced(
    adapter: Adapter,
    paragraphs: Paragraphs,
    replacements: int,
    seed: int,
    memory_budget: int | None,
) -> Int[Tensor, "paragraph draw bos_and_pos"]:
    """The prefixes, each with one token replaced, which is not the last where there are more."""
    tokens, _ = choose_tokens(
        adapter, paragraphs, "random", replacements, None, seed, memory_budget
    )
    generator = torch.Generator().manual_seed(seed)
    n_places = max(1, paragraphs.n_prefix - 1)
    place = torch.randint(n_places, (len(paragraphs), replacements), generator=generator)
    token = tokens.transpose(1, 2).gather(2, place[..., None])
    prefix = paragraphs.inputs[:, : paragraphs.n_given]
    changed = prefix[:, None].repeat(1, replacements, 1)
    return changed.scatter(2, place[..., None] + paragraphs.n_bos, token)
