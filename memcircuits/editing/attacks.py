"""Prefixes that bring a text back although its own prefix no longer does.

An edit that was made for one prefix may have changed the answer to that prefix alone. The deep
objective of `unlearn` trains on these prefixes, and an audit tries them, each with new draws:

| attack | the prefix |
| --- | --- |
| `replaced` | one to half of its tokens are replaced by tokens of other text |
| `spliced` | only its last tokens are kept, behind the beginning of another text |
| `cut` | its first tokens are left out, so that all positions move |
| `prepended` | it stands behind the end of another text, as far as the context allows |

The continuation is the true one. Entries in the middle of a continuation need no attack of their
own: teacher forcing measures every position behind all true tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs

AttackName = Literal["replaced", "spliced", "cut", "prepended"]

Attack = Callable[[Paragraphs, Paragraphs, int, torch.Generator], Paragraphs]
"""From paragraphs, texts to take other tokens from, the longest row that the model reads, and a
generator, to the paragraphs behind other prefixes, row by row."""


def replaced(
    paragraphs: Paragraphs, fillers: Paragraphs, n_ctx: int, generator: torch.Generator
) -> Paragraphs:
    """One to half of the prefix tokens, at random places, are tokens of other texts."""
    n_rows, n_prefix = len(paragraphs), paragraphs.n_prefix
    count = torch.randint(1, max(2, n_prefix // 2 + 1), (n_rows, 1), generator=generator)
    order = torch.rand(n_rows, n_prefix, generator=generator).argsort(-1)
    tokens = fillers.ids.flatten()
    drawn = tokens[torch.randint(len(tokens), (n_rows, n_prefix), generator=generator)]
    return _behind(paragraphs, torch.where(order < count, drawn, paragraphs.prefix))


def spliced(
    paragraphs: Paragraphs, fillers: Paragraphs, n_ctx: int, generator: torch.Generator
) -> Paragraphs:
    """The last tokens of the prefix, a tenth to nine tenths of it, behind another text."""
    n_prefix = paragraphs.n_prefix
    kept = torch.randint(
        max(1, n_prefix // 10), max(2, n_prefix - n_prefix // 10), (len(paragraphs), 1),
        generator=generator,
    )  # fmt: skip
    is_other = torch.arange(n_prefix) < n_prefix - kept
    other = _openings(fillers, len(paragraphs), n_prefix, generator)
    return _behind(paragraphs, torch.where(is_other, other, paragraphs.prefix))


def cut(
    paragraphs: Paragraphs, fillers: Paragraphs, n_ctx: int, generator: torch.Generator
) -> Paragraphs:
    """The prefixes without their first tokens, a tenth to three quarters of them."""
    n_prefix = paragraphs.n_prefix
    if n_prefix == 1:
        return paragraphs
    low, high = max(1, n_prefix // 10), max(2, 3 * n_prefix // 4)
    n_cut = int(torch.randint(low, high, (1,), generator=generator))
    return paragraphs.with_ids(paragraphs.ids[:, n_cut:], n_prefix - n_cut)


def prepended(
    paragraphs: Paragraphs, fillers: Paragraphs, n_ctx: int, generator: torch.Generator
) -> Paragraphs:
    """The paragraphs behind tokens of another text, at most half a prefix of them."""
    room = min(n_ctx - paragraphs.inputs.shape[1], max(1, paragraphs.n_prefix // 2))
    if room < 1:
        return paragraphs
    n_more = int(torch.randint(1, room + 1, (1,), generator=generator))
    more = _openings(fillers, len(paragraphs), n_more, generator)
    return paragraphs.with_ids(
        torch.cat([more, paragraphs.ids], 1), paragraphs.n_prefix + more.shape[1]
    )


ATTACKS: Mapping[AttackName, Attack] = {
    "replaced": replaced,
    "spliced": spliced,
    "cut": cut,
    "prepended": prepended,
}
"""All attacks by name."""


def _openings(
    fillers: Paragraphs, n_rows: int, n_pos: int, generator: torch.Generator
) -> Int[Tensor, "row pos"]:
    """The first tokens of a filler for each row, repeated where a filler is shorter."""
    rows = fillers.ids[torch.randint(len(fillers), (n_rows,), generator=generator)]
    return rows[:, torch.arange(n_pos) % rows.shape[1]]


def _behind(paragraphs: Paragraphs, prefix: Int[Tensor, "row pos"]) -> Paragraphs:
    return paragraphs.with_ids(torch.cat([prefix, paragraphs.continuation], 1))
