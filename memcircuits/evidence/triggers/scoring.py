"""EM and NLL of paragraphs with one prefix token replaced, for all positions and replacements.

All (position, paragraph, draw) triples are rows of one long batch, unembedded only where they
predict the continuation. Replacing the token at position i leaves the activations before i as they
are. Where the model can share prefixes (`Adapter.supports_prefix_cache`), keys and values of the
prefixes are therefore computed once per paragraph, and a batch of rows runs from its first replaced
position on. A few positions are taken at a time, so that this first position is not far from the
others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.prefix_cache import KeysValues

_MAX_PARAGRAPHS_CACHED = 64  # paragraphs whose keys and values are held at once
_POSITIONS_PER_BATCH = 8


def score_replacements(
    adapter: Adapter,
    paragraphs: Paragraphs,
    tokens: Int[Tensor, "paragraph pos draw"],
    memory_budget: int | None,
    done: Callable[[int], None] | None = None,
) -> tuple[Int[Tensor, "paragraph pos draw"], Float[Tensor, "paragraph pos draw"]]:
    """EM and NLL of the given continuation when single prefix tokens are replaced.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        tokens: the replacements of every prefix token.
        memory_budget: maximum bytes per batch.
        done: called with the number of replacements after each batch.

    Returns:
        EM in tokens and NLL in nats/token.
    """
    n, n_positions, draws = tokens.shape
    inputs, n_given = paragraphs.inputs, paragraphs.n_given
    size = rows_that_fit(adapter, inputs.shape[1], paragraphs.n_continuation, memory_budget)
    shares_prefixes = n_given > 1 and adapter.supports_prefix_cache(inputs.shape[1] - 1)
    replaced = _ReplacedPrefixes(adapter, paragraphs, tokens)
    em, nll = torch.empty_like(tokens), torch.empty(tokens.shape)
    for rows in torch.arange(n).split(min(size, _MAX_PARAGRAPHS_CACHED)):
        cache: KeysValues = []
        if shares_prefixes:
            cache = adapter.prefix_keys_and_values(inputs[rows, : n_given - 1])
        for positions in torch.arange(n_positions).split(_POSITIONS_PER_BATCH):
            triples = torch.cartesian_prod(positions, rows, torch.arange(draws))
            score = partial(replaced.score, triples, cache, int(rows[0]))
            scores = map_batches(len(triples), size, score, done)
            position, row, draw = triples.unbind(-1)
            em[row, position, draw] = scores[:, 0].long()
            nll[row, position, draw] = scores[:, 1]
    return em, nll


@dataclass(frozen=True)
class _ReplacedPrefixes:
    adapter: Adapter
    paragraphs: Paragraphs
    tokens: Int[Tensor, "paragraph pos draw"]

    def score(
        self,
        triples: Int[Tensor, "triple 3"],
        cache: KeysValues,
        first_row: int,
        batch: slice,
    ) -> Float[Tensor, "triple 2"]:
        """EM and NLL of a batch of (position, paragraph, draw) triples.

        Args:
            triples: all triples.
            cache: keys and values of the prefixes, or nothing.
            first_row: the paragraph that the first row of `cache` belongs to.
            batch: the triples to run.
        """
        position, row, draw = triples[batch].unbind(-1)
        inputs, n_given = self.paragraphs.inputs[row], self.paragraphs.n_given
        input_position = self.paragraphs.n_bos + position
        inputs[torch.arange(len(row)), input_position] = self.tokens[row, position, draw]
        start = int(input_position.min()) if cache else 0
        predicting = slice(n_given - 1 - start, None)
        if start:
            logits = self.adapter.run_after_prefix(
                start, inputs[:, :-1], cache, row - first_row, positions=predicting
            )
        else:
            logits = self.adapter.run(inputs[:, :-1], positions=predicting).logits
        scores = read_continuation(logits, inputs[:, n_given:].to(self.adapter.device))
        return torch.stack([scores.em.float(), scores.nll], 1).cpu()


def most_destructive(
    em: Int[Tensor, "paragraph pos draw"], nll: Float[Tensor, "paragraph pos draw"]
) -> tuple[Int[Tensor, " paragraph"], Int[Tensor, " paragraph"]]:
    """Position and draw of the lowest EM; among equals, of the highest NLL."""
    draws = em.shape[2]
    em, nll = em.flatten(1), nll.flatten(1)
    lowest = em == em.amin(-1, keepdim=True)
    index = nll.masked_fill(~lowest, -torch.inf).argmax(-1)
    return index // draws, index % draws
