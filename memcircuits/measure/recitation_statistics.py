"""Quantities derived from EM and log-probability: samples needed, buckets, the duplication curve.

They are functions of plain columns, so that a `Scan` in memory and a corpus scan on disk
(`memcircuits.measure.corpus`) compute them by the same code.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from memcircuits.base.errors import InputError, at_least

if TYPE_CHECKING:
    import pandas as pd

REPETITION_COLUMNS = ("repetitions", "count")
"""Columns that say how often a paragraph was seen in training; the first one present counts."""

DUPLICATION_COLUMNS = (*REPETITION_COLUMNS, "duplicates")
"""The same, and the copies that a scan found in its corpus, which may be no training data."""

_MAX_GROUPS = 20  # of the duplication curve; more different counts are grouped by powers of two


def samples_needed(
    log_prob: Float[np.ndarray, " paragraph"], p: float
) -> Float[np.ndarray, " paragraph"]:
    """Number of samples until a continuation appears with probability `p`.

    It is log(1 - p) / log(1 - exp(log_prob)), rounded up; infinite below about exp(-745).

    Args:
        log_prob: log-probability of the whole continuation, nats.
        p: the probability asked for.

    Raises:
        InputError: if `p` does not lie between 0 and 1.
    """
    if not 0 < p < 1:
        raise InputError("p", p, "give a probability between 0 and 1")
    prob = np.minimum(np.exp(log_prob), 1.0)
    with np.errstate(divide="ignore", over="ignore"):
        return np.maximum(1.0, np.ceil(np.log1p(-p) / np.log1p(-prob)))


def extraction_probability(
    log_prob: Float[np.ndarray, " paragraph"], n: int
) -> Float[np.ndarray, " paragraph"]:
    """Probability that at least one of `n` samples is the continuation: 1 - (1 - p)^n.

    Args:
        log_prob: log-probability of the whole continuation, nats.
        n: number of samples.

    Raises:
        InputError: if `n` is not a positive integer.
    """
    at_least("n", n, 1)
    with np.errstate(divide="ignore"):
        return -np.expm1(n * np.log1p(-np.minimum(np.exp(log_prob), 1.0)))


def em_buckets(em: np.ndarray, n_continuation: int) -> list[str]:
    """The paper's buckets of EM, with edges at a fifth, three fifths and all of the continuation.

    Of 50 tokens these are `0-10`, `11-29`, `30-49` and `50`.
    """
    n = n_continuation
    edges = [-1, n // 5, (3 * n - 1) // 5, n - 1, n]
    names = [f"{low + 1}-{high}" for low, high in pairwise(edges[:-1])] + [str(n)]
    return [names[i] for i in np.searchsorted(edges[1:], em)]


def em_ranges(em: np.ndarray, n_continuation: int) -> list[str]:
    """Ten ranges of equal width for a histogram of EM; none and all of the tokens by themselves.

    Of 50 tokens these are `0`, `1-5`, `6-10` and so on to `46-49`, and `50`.
    """
    n = n_continuation
    width = max(1, -(-n // 10))
    names = {0: "0", n: str(n)}
    for low in range(1, n, width):
        high = min(low + width - 1, n - 1)
        names |= {i: f"{low}-{high}" if low < high else str(low) for i in range(low, high + 1)}
    return [names[int(value)] for value in em]


def borders_on_recitation(
    em: Int[np.ndarray, " window"], n_continuation: int, stride: int
) -> Bool[np.ndarray, " window"]:
    """Which windows, recited in part, may have one between them that is recited in full.

    Where a passage is recited from a window, a window that begins k < stride tokens later would
    recite what is left of the passage, at least n_continuation - k tokens, but for slips behind
    another prefix: twice as many are allowed to be missing, and at most half of the continuation.

    Args:
        em: tokens recited in each window.
        n_continuation: tokens of a continuation.
        stride: tokens from one window to the next.
    """
    least = max(n_continuation / 2, n_continuation - 2 * stride)
    return (em >= least) & (em < n_continuation) & (stride > 1)


def missed_between_windows(length: int, stride: int) -> str:
    """A sentence: which recited passages windows of `length` tokens may miss."""
    return (
        f"Windows begin every {stride} tokens: a recited passage of {length} tokens is found only "
        f"where a window begins with it, one of {length + stride - 1} or more always."
    )


def by_repetitions(frame: pd.DataFrame) -> pd.DataFrame:
    """The duplication curve (figure 2): EM and NLL against times seen in training.

    Args:
        frame: a table as `Scan.to_frame` gives it.

    Returns:
        Columns `repetitions, n, em, em_se, nll, nll_se, memorized`. More than 20 different counts
        are grouped by powers of two (8 stands for 8 to 15).

    Raises:
        InputError: if the table does not say how often the paragraphs were seen, in a column
            `repetitions`, `count` or `duplicates`.
    """
    key = next((key for key in DUPLICATION_COLUMNS if key in frame), None)
    if key is None:
        raise InputError(
            "paragraphs",
            f"no column {' or '.join(DUPLICATION_COLUMNS)}",
            "the duplication curve needs counts",
        )
    counts = frame[key]
    if not np.issubdtype(counts.dtype, np.number):
        raise InputError("paragraphs", f"{key} holds no numbers", "give counts")
    if counts.nunique() > _MAX_GROUPS:
        counts = np.exp2(np.floor(np.log2(counts.where(counts > 0)))).fillna(0).astype(int)
    groups = frame.assign(repetitions=counts).groupby("repetitions")
    return groups.agg(
        n=("em", "size"),
        em=("em", "mean"),
        em_se=("em", "sem"),
        nll=("nll", "mean"),
        nll_se=("nll", "sem"),
        memorized=("memorized", "sum"),
    ).reset_index()
