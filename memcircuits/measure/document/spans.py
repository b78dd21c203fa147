"""From windows to passages: the largest value of any window at a token, and maximal spans.

Windows overlap, so that most tokens are continuations of several windows. A token has the largest
value of those, and is recited if it is in the continuation of a window that is recited in full.
Recited tokens without a gap between them are one span, however many windows it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class RecitedSpan:
    """A passage that the model recites, as long as it can be made.

    Attributes:
        first_token: its first token.
        n_tokens: number of its tokens.
        start: place of its first character in the text.
        end: place behind its last character.
        line: line of the text in which it begins, from 1.
        n_windows: number of recited windows whose continuations it is made of.
        log_prob: log p of the likeliest of these continuations, nats.
    """

    first_token: int
    n_tokens: int
    start: int
    end: int
    line: int
    n_windows: int
    log_prob: float


def largest_at_tokens(
    starts: Int[np.ndarray, " window"],
    lengths: Int[np.ndarray, " window"],
    values: Float[np.ndarray, " window"],
    n_tokens: int,
) -> Float[np.ndarray, " token"]:
    """The largest value of the windows that cover a token; NaN where none does.

    Args:
        starts: first token that a window covers.
        lengths: number of tokens that it covers.
        values: its value.
        n_tokens: number of tokens of the document.
    """
    largest = np.full(n_tokens, np.nan)
    for window in np.argsort(values, kind="stable"):
        largest[starts[window] : starts[window] + lengths[window]] = values[window]
    return largest


def runs(mask: Bool[np.ndarray, " token"]) -> list[tuple[int, int]]:
    """First token and token behind the last of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
