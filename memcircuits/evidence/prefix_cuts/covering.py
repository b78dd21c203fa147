"""Which token sequences spell a prefix that was cut inside a token, and how likely is each?

The model reads tokens, so that a prefix cut at a byte has no tokens of its own: the tokenizer gives
the letters before the cut other tokens than the whole word has. The last few tokens are therefore
taken back, and a *covering sequence* takes their place: tokens whose bytes begin with the bytes
taken back, S, and whose last token reaches the cut or goes beyond it (Athiwaratkun et al. 2024,
arXiv 2403.08688, section 3, who follow one such sequence greedily).

1. After the tokens that are kept, every token is allowed that begins with S, or that S begins with.
2. A token that begins with S completes a covering sequence. After any other, the same is asked
   again with what remains of S.
3. The *aligned* sequence takes the most likely allowed token each time. The *marginal* takes all:
   the probability of a covering sequence is the product of its tokens' probabilities, divided by
   the sum over all covering sequences.

Branches whose probability is below `tolerance` times what has been found are not followed; what
they could add at most is kept in `Covering.unexplored`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.data.token_bytes import TokenBytes
from memcircuits.evidence.prefix_cuts.decoding import Start, next_log_probs
from memcircuits.models.adapter import Adapter


@dataclass(frozen=True)
class Cut:
    """A text cut at a byte.

    Attributes:
        kept: tokens that are not taken back.
        removed: bytes of the tokens taken back, up to the cut.
        following: the true text after the cut.
    """

    kept: tuple[int, ...]
    removed: bytes
    following: bytes


@dataclass
class Covering:
    """The covering sequences of a cut; probabilities are those after the tokens kept.

    Attributes:
        aligned: the sequence of the most likely allowed tokens; None if it comes to an end where no
            token is allowed.
        true: covering sequences that spell the true text, and their probabilities.
        bytes_right: probability that the covering sequence spells the first 1, 2, ... bytes of the
            true text.
        all_right: probability that it spells all of the true text.
        total: probability of all covering sequences.
        unexplored: upper bound of the probability of those that were not followed.
    """

    aligned: Start | None = None
    true: list[tuple[Start, float]] = field(default_factory=list)
    bytes_right: list[float] = field(default_factory=list)
    all_right: float = 0.0
    total: float = 0.0
    unexplored: float = 0.0


class _Branch(NamedTuple):
    """The beginning of covering sequences: what of S remains, and its probability."""

    cut: int
    remaining: bytes
    probability: float
    is_aligned: bool


def covering_sequences(
    adapter: Adapter,
    table: TokenBytes,
    cuts: Sequence[Cut],
    tolerance: float,
    memory_budget: int | None,
) -> list[Covering]:
    """The covering sequences of every cut."""
    coverings = [Covering() for _ in cuts]
    branches: dict[tuple[int, ...], list[_Branch]] = defaultdict(list)
    for i, cut in enumerate(cuts):
        if cut.removed:
            branches[cut.kept].append(_Branch(i, cut.removed, 1.0, True))
        else:  # nothing was taken back: the tokens kept are the only covering sequence
            start = Start(cut.kept, b"", cut.following)
            coverings[i] = Covering(aligned=start, true=[(start, 1.0)], total=1.0)
    order = torch.tensor(table.ids_in_order)
    while branches:
        deeper: dict[tuple[int, ...], list[_Branch]] = defaultdict(list)
        for ids, log_probs in next_log_probs(adapter, branches, memory_budget):
            in_order = log_probs[order].double().exp()
            for branch in branches[ids]:
                covering, following = coverings[branch.cut], cuts[branch.cut].following
                _complete(table, covering, branch, ids, following, in_order)
                best = _most_likely(table, branch, order, log_probs)
                if best is not None and table.of_id[best].startswith(branch.remaining):
                    ahead = table.of_id[best][len(branch.remaining) :]
                    covering.aligned = Start((*ids, best), ahead, following)
                for token, child in _children(table, branch, best, log_probs):
                    if child.is_aligned or child.probability > tolerance * covering.total:
                        deeper[(*ids, token)].append(child)
                    else:
                        covering.unexplored += child.probability
        branches = deeper
    for covering in coverings:
        _leave_out_unlikely(covering, tolerance)
    return coverings


def _leave_out_unlikely(covering: Covering, tolerance: float) -> None:
    """Do not decode after sequences that hardly count."""
    likely = [(start, p) for start, p in covering.true if p > tolerance * covering.total]
    covering.unexplored += sum(p for _, p in covering.true) - sum(p for _, p in likely)
    covering.true = likely


def _complete(
    table: TokenBytes,
    covering: Covering,
    branch: _Branch,
    ids: tuple[int, ...],
    following: bytes,
    in_order: Float[Tensor, " token"],
) -> None:
    """Add the sequences that one more token completes."""

    def probability(text: bytes) -> float:
        return branch.probability * float(in_order[table.beginning_with(text)].sum())

    covering.total += probability(branch.remaining)
    covering.all_right += probability(branch.remaining + following)
    for length in range(1, len(following) + 1):
        right = probability(branch.remaining + following[:length])
        if right == 0:
            break
        if len(covering.bytes_right) < length:
            covering.bytes_right.append(0.0)
        covering.bytes_right[length - 1] += right
    for token in table.within(branch.remaining + following[:-1]):
        n_ahead = len(table.of_id[token]) - len(branch.remaining)
        if n_ahead >= 0:
            p = branch.probability * float(in_order[table.place_of[token]])
            covering.true.append((Start((*ids, token), following[:n_ahead], following), p))


def _most_likely(
    table: TokenBytes,
    branch: _Branch,
    order: Int[Tensor, " token"],
    log_probs: Float[Tensor, " d_vocab"],
) -> int | None:
    """The most likely allowed token after the aligned sequence; None after any other."""
    if not branch.is_aligned:
        return None
    inside = torch.tensor(table.within(branch.remaining[:-1]), dtype=torch.long)
    allowed = torch.cat([order[table.beginning_with(branch.remaining)], inside])
    return int(allowed[log_probs[allowed].argmax()]) if len(allowed) else None


def _children(
    table: TokenBytes, branch: _Branch, best: int | None, log_probs: Float[Tensor, " d_vocab"]
) -> Iterator[tuple[int, _Branch]]:
    """The tokens that leave some of S, and what follows them."""
    for token in table.within(branch.remaining[:-1]):
        remaining = branch.remaining[len(table.of_id[token]) :]
        probability = branch.probability * math.exp(float(log_probs[token]))
        yield token, _Branch(branch.cut, remaining, probability, token == best)
