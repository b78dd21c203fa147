"""A number of the page, with what it was measured on."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One measured number.

    Attributes:
        model: name of the model.
        n: number of paragraphs.
        seed: seed of the draws.
        what: what was measured, with its unit.
        value: the number.
        low: lower bound of the 95 % interval, None where there is none.
        high: upper bound.
    """

    model: str
    n: int
    seed: int
    what: str
    value: float
    low: float | None = None
    high: float | None = None
