"""Tokens that replace prefix tokens.

A random token tells how much a position matters at all. The other kinds hold something fixed: a
token that is about as frequent in the corpus keeps the rarity, one with a similar embedding keeps
the meaning, and the model's own second choice keeps the prefix probable.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit

Replacement = Literal["random", "frequency", "neighbor", "second"]
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)

_RANKS_EACH_SIDE = 10  # a frequency-matched token is one of the 20 nearest in frequency rank
_TOKENS_PER_PRODUCT = 1024  # rows of one product with the embedding matrix


def choose_tokens(
    adapter: Adapter,
    paragraphs: Paragraphs,
    replacement: Replacement,
    draws: int,
    unigrams: UnigramTable | None,
    seed: int,
    memory_budget: int | None,
) -> tuple[Int[Tensor, "paragraph pos draw"], tuple[str, ...]]:
    """Replacements of every prefix token, none equal to the token itself, and notes for the reader.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        replacement: the kind of replacement.
        draws: number of replacements per position.
        unigrams: token counts for `frequency`; by default the paragraphs are counted.
        seed: of the random draws.
        memory_budget: maximum bytes per batch.

    Raises:
        InputError: for an unknown kind, too many draws, or a table of another tokenizer.
    """
    one_of("replacement", replacement, REPLACEMENTS)
    at_least("draws", draws, 1)
    prefix = paragraphs.prefix
    n_tokens = _n_known_tokens(adapter, prefix)
    if n_tokens <= draws and replacement in ("neighbor", "second"):
        raise InputError("draws", draws, f"there are only {n_tokens - 1} other tokens")
    generator = torch.Generator().manual_seed(seed)
    random = _random_tokens(prefix, draws, n_tokens, generator)
    if replacement == "random":
        return random, ()
    if replacement == "neighbor":
        return _nearest_in_embedding(adapter, prefix, draws, n_tokens), ()
    if replacement == "second":
        likely = _most_likely_others(adapter, paragraphs, draws, n_tokens, memory_budget)
        if paragraphs.bos:
            return likely, ()
        random[:, 1:] = likely
        return random, ("nothing precedes the first token: it is replaced at random",)
    notes: tuple[str, ...] = ()
    if unigrams is None:
        unigrams = UnigramTable.from_tokens(
            paragraphs.ids, adapter.d_vocab, source="the paragraphs themselves"
        )
        notes = ("no unigram table was given: frequencies are counted in the paragraphs",)
    else:
        UnigramTable.check(unigrams, adapter.model)
    return _similar_in_frequency(prefix, draws, unigrams.counts[:n_tokens], generator), notes


def _n_known_tokens(adapter: Adapter, prefix: Int[Tensor, "paragraph pos"]) -> int:
    """Tokens that the tokenizer knows: embedding matrices are often padded beyond them."""
    known = len(adapter.tokenizer) if adapter.tokenizer else adapter.d_vocab
    return max(min(adapter.d_vocab, known), int(prefix.max()) + 1)


def _random_tokens(
    prefix: Int[Tensor, "paragraph pos"], draws: int, n_tokens: int, generator: torch.Generator
) -> Int[Tensor, "paragraph pos draw"]:
    """Uniform over all other tokens."""
    tokens = torch.randint(n_tokens - 1, (*prefix.shape, draws), generator=generator)
    return tokens + (tokens >= prefix[..., None])  # skip the token itself


def _similar_in_frequency(
    prefix: Int[Tensor, "paragraph pos"],
    draws: int,
    counts: Int[Tensor, " token"],
    generator: torch.Generator,
) -> Int[Tensor, "paragraph pos draw"]:
    """Uniform over the 20 other tokens nearest in frequency rank, fewer in tiny vocabularies."""
    n_tokens = len(counts)
    by_frequency = counts.argsort(stable=True)
    rank = by_frequency.argsort()[prefix][..., None]
    width = min(2 * _RANKS_EACH_SIDE, n_tokens - 1)
    lowest = (rank - _RANKS_EACH_SIDE).clamp(0, n_tokens - 1 - width)
    drawn = lowest + torch.randint(width, (*prefix.shape, draws), generator=generator)
    return by_frequency[drawn + (drawn >= rank)]  # skip the token itself


def _nearest_in_embedding(
    adapter: Adapter, prefix: Int[Tensor, "paragraph pos"], draws: int, n_tokens: int
) -> Int[Tensor, "paragraph pos draw"]:
    """The `draws` other tokens with the largest cosine similarity of embeddings."""
    embedding = torch.nn.functional.normalize(adapter.embeddings()[:n_tokens].float(), dim=-1)
    tokens, index = prefix.unique(return_inverse=True)
    nearest = []
    for some_tokens in tokens.split(_TOKENS_PER_PRODUCT):
        cosine: Float[Tensor, "token other"]
        cosine = embedding[some_tokens.to(embedding.device)] @ embedding.T
        cosine = cosine.nan_to_num(nan=-torch.inf)  # a damaged embedding is no neighbour
        cosine[torch.arange(len(some_tokens)), some_tokens] = -torch.inf
        nearest.append(cosine.topk(draws).indices.cpu())
    return torch.cat(nearest)[index]


def _most_likely_others(
    adapter: Adapter,
    paragraphs: Paragraphs,
    draws: int,
    n_tokens: int,
    memory_budget: int | None,
) -> Int[Tensor, "paragraph pos draw"]:
    """The `draws` most likely other tokens at every prefix position that a token precedes."""
    prefix, n_bos = paragraphs.inputs[:, : paragraphs.n_given], paragraphs.n_bos
    predicted = slice(max(n_bos, 1), None)  # nothing predicts a token that nothing precedes
    if not len(prefix[0, predicted]):
        return torch.empty(len(prefix), 0, draws, dtype=torch.long)

    def one_batch(batch: slice) -> Tensor:
        positions = slice(predicted.start - 1, None)
        logits = adapter.run(prefix[batch, :-1], positions=positions).logits[..., :n_tokens].float()
        actual = prefix[batch, predicted, None].to(logits.device)
        return logits.scatter(-1, actual, -torch.inf).topk(draws).indices.cpu()

    size = rows_that_fit(adapter, prefix.shape[1], prefix.shape[1], memory_budget)
    return map_batches(len(prefix), size, one_batch)
