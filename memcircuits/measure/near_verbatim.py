"""Recitations with slips: how near the greedy continuation comes to the true one.

EM stops counting at the first mismatch. A model that slips once and then goes on with the text, as
a model in 4 bits may, recites to a reader's eye but not to EM. Three measures see it:

* the longest run of tokens that the greedy continuation and the true one share, wherever it stands
  (longest common substring);
* their similarity, 1 - Levenshtein distance / length, in [0, 1]. It counts tokens: one wrong token
  of 50 gives 0.98, and one that is left out 0.96, because the end then holds one token more;
* Extraction Strength, which needs no decoding.

Extraction Strength is the share of the continuation that is recited once the model was given the
beginning: 1 - k / L, where k is the smallest number of true tokens of the L after which all others
are greedy choices. It is read from the pass that scores the continuation. open-unlearning computes
the same from its pass (`evals/metrics/memorization.py`), with two differences. Its loop ends at
k = L - 1, so that it gives 1 / L instead of 0 where even the last token is wrong. And its L counts
the tokens that carry a label, which are the answer and the token that ends it; ours counts the
continuation.
"""

from __future__ import annotations

from difflib import SequenceMatcher

import torch
from jaxtyping import Bool, Float, Int
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import Continuation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.adapter import Adapter

NEAR_VERBATIM = 0.9
"""Least similarity of a near-verbatim recitation: of 50 tokens, 5 edits."""


def decoded_where_unknown(
    adapter: Adapter,
    paragraphs: Paragraphs,
    scores: Continuation,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Int[Tensor, "paragraph pos"]:
    """The greedy continuations; a paragraph that is recited in full is not decoded again."""
    greedy = paragraphs.continuation.clone()
    unknown = scores.em < paragraphs.n_continuation
    if unknown.any():
        decoded = greedy_continuations(
            adapter, paragraphs[unknown], memory_budget=memory_budget, progress=progress
        )
        greedy[unknown] = decoded.continuation
    return greedy


def longest_matches(
    truth: Int[Tensor, "paragraph pos"], greedy: Int[Tensor, "paragraph pos"]
) -> Int[Tensor, " paragraph"]:
    """Number of tokens of the longest run that both continuations contain."""
    pairs = zip(truth.tolist(), greedy.tolist(), strict=True)
    matchers = (SequenceMatcher(None, a, b, autojunk=False) for a, b in pairs)
    return torch.tensor([matcher.find_longest_match().size for matcher in matchers])


def similarities(
    truth: Int[Tensor, "paragraph pos"], greedy: Int[Tensor, "paragraph pos"]
) -> Float[Tensor, " paragraph"]:
    """1 - Levenshtein distance / length of the continuations, in [0, 1]."""
    pairs = zip(truth.tolist(), greedy.tolist(), strict=True)
    return torch.tensor([Levenshtein.normalized_similarity(a, b) for a, b in pairs])


def extraction_strength(correct: Bool[Tensor, "paragraph pos"]) -> Float[Tensor, " paragraph"]:
    """Share of the continuation after its last token that is no greedy choice, in [0, 1]."""
    return correct.flip(-1).long().cumprod(-1).sum(-1) / correct.shape[-1]
