"""Other tokens in the place of prefix tokens: choosing them, and measuring what is left.

A random token says how much a position matters at all. The others hold something fixed: a token
about as frequent (so that rarity is not what changes), one with a similar embedding, or the one
that the model itself would have written there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, one_of
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.prefix_cache import KeysValues

REPLACEMENTS = ("random", "frequency", "neighbor", "second")


_NEAR = 10  # a frequency-matched token is one of the 20 nearest in rank


_GROUP = 64  # paragraphs whose keys and values are held at once


_POSITIONS = 8  # replaced in one batch


def choose_tokens(
    adapter: Adapter,
    paragraphs: Paragraphs,
    replacement: str,
    draws: int,
    unigrams: UnigramTable | None,
    seed: int,
    memory_budget: int | None,
) -> tuple[Int[Tensor, "paragraph pos draw"], tuple[str, ...]]:
    """Token ids to put in, none equal to the one it replaces, and what to tell the reader."""
    one_of("replacement", replacement, REPLACEMENTS)
    at_least("draws", draws, 1)
    prefix = paragraphs.prefix
    # Embedding matrices are often padded beyond the tokenizer's vocabulary.
    n_tokens = min(adapter.d_vocab, len(adapter.tokenizer or range(adapter.d_vocab)))
    n_tokens = max(n_tokens, int(prefix.max()) + 1)
    if n_tokens <= draws and replacement in ("neighbor", "second"):
        raise InputError("draws", draws, f"there are only {n_tokens - 1} other tokens")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(n_tokens - 1, (*prefix.shape, draws), generator=generator)
    random += random >= prefix[..., None]
    if replacement == "random":
        return random, ()
    if replacement == "neighbor":
        return _neighbors(adapter, prefix, draws, n_tokens), ()
    if replacement == "second":
        random[:, 1:] = _other_choices(adapter, paragraphs, draws, n_tokens, memory_budget)
        return random, ("nothing precedes the first token: it is replaced at random",)
    notes: tuple[str, ...] = ()
    if unigrams is None:
        unigrams = UnigramTable.from_tokens(
            paragraphs.ids, adapter.d_vocab, source="the paragraphs themselves"
        )
        notes = ("no unigram table was given: frequencies are counted in the paragraphs",)
    else:
        UnigramTable.check(unigrams, adapter.model)
    order = unigrams.counts[:n_tokens].argsort(stable=True)
    rank = order.argsort()[prefix][..., None]
    width = min(2 * _NEAR, n_tokens - 1)
    first = (rank - _NEAR).clamp(0, n_tokens - 1 - width)
    near = first + torch.randint(width, random.shape, generator=generator)
    return order[near + (near >= rank)], notes


def _neighbors(
    adapter: Adapter, prefix: Int[Tensor, "paragraph pos"], draws: int, n_tokens: int
) -> Int[Tensor, "paragraph pos draw"]:
    embedding = torch.nn.functional.normalize(adapter.model.W_E[:n_tokens].float(), dim=-1)
    tokens, place = prefix.unique(return_inverse=True)
    nearest = []
    for some in tokens.split(1024):
        cosine = embedding[some.to(embedding.device)] @ embedding.T
        cosine = cosine.nan_to_num(nan=-torch.inf)  # a damaged embedding is nobody's neighbour
        cosine[torch.arange(len(some)), some] = -torch.inf
        nearest.append(cosine.topk(draws).indices.cpu())
    return torch.cat(nearest)[place]


def _other_choices(
    adapter: Adapter,
    paragraphs: Paragraphs,
    draws: int,
    n_tokens: int,
    memory_budget: int | None,
) -> Int[Tensor, "paragraph pos draw"]:
    """The most likely other tokens at every prefix position but the first."""
    prefix = paragraphs.prefix
    if prefix.shape[1] == 1:
        return torch.empty(len(prefix), 0, draws, dtype=torch.long)

    def one_batch(piece: slice) -> Tensor:
        logits = adapter.run(prefix[piece, :-1]).logits[..., :n_tokens].float()
        actual = prefix[piece, 1:, None].to(logits.device)
        return logits.scatter(-1, actual, -torch.inf).topk(draws).indices.cpu()

    size = rows_that_fit(adapter, prefix.shape[1], prefix.shape[1], memory_budget)
    return map_batches(len(prefix), size, one_batch)


def measure_replaced(
    adapter: Adapter,
    ids: Int[Tensor, "batch pos"],
    n_prefix: int,
    tokens: Int[Tensor, "batch pos draw"],
    memory_budget: int | None,
    done: Callable[[int], None] | None = None,
) -> tuple[Int[Tensor, "batch pos draw"], Float[Tensor, "batch pos draw"]]:
    """EM and NLL with each single prefix token replaced by each of its candidates.

    What lies before a replaced token is computed once for each paragraph, where the model can share
    it (`Adapter.supports_prefix_cache`): keys and values of the prefix are kept, and a batch runs from its
    first replaced position on.
    """
    n, n_positions, draws = tokens.shape
    size = rows_that_fit(adapter, ids.shape[1], ids.shape[1] - n_prefix, memory_budget)
    shares = n_prefix > 1 and adapter.supports_prefix_cache(ids.shape[1] - 1)
    em, nll = torch.empty_like(tokens), torch.empty(tokens.shape)
    for rows in torch.arange(n).split(min(size, _GROUP)):
        before = adapter.prefix_keys_and_values(ids[rows, : n_prefix - 1]) if shares else []
        # A few positions at a time, so that the rows of a batch begin alike for long.
        for positions in torch.arange(n_positions).split(_POSITIONS):
            some = torch.cartesian_prod(positions, rows, torch.arange(draws))

            def one_batch(piece: slice, some: Tensor = some, before: KeysValues = before) -> Tensor:
                position, row, draw = some[piece].unbind(-1)
                changed = ids[row]
                changed[torch.arange(len(row)), position] = tokens[row, position, draw]
                start = int(position.min()) if shares else 0
                predicting = slice(n_prefix - 1 - start, None)
                if start:
                    logits = adapter.run_after_prefix(
                        start, changed[:, :-1], before, row - some[0, 1], positions=predicting
                    )
                else:
                    logits = adapter.run(changed[:, :-1], positions=predicting).logits
                found = read_continuation(logits, changed[:, n_prefix:].to(adapter.device))
                return torch.stack([found.em.float(), found.nll], 1).cpu()

            found = map_batches(len(some), size, one_batch, done)
            position, row, draw = some.unbind(-1)
            em[row, position, draw], nll[row, position, draw] = found[:, 0].long(), found[:, 1]
    return em, nll


def most_destructive(
    em: Int[Tensor, "batch pos draw"], nll: Float[Tensor, "batch pos draw"]
) -> Int[Tensor, " batch"]:
    """Flat index of the lowest EM; among equals of the highest NLL."""
    em, nll = em.flatten(1), nll.flatten(1)
    lowest = em == em.amin(-1, keepdim=True)
    return nll.masked_fill(~lowest, -torch.inf).argmax(-1)
