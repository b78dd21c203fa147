"""A number of the page, with what it was measured on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from companions_page.subjects import SEED
from torch import Tensor

from memcircuits.base.statistics import bootstrap_interval


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


def mean_row(model: str, what: str, values: Tensor) -> Row:
    """The mean of one number per paragraph, with its interval."""
    low, high = bootstrap_interval(values, seed=SEED).tolist()
    return Row(model, len(values), SEED, what, float(values.mean()), low, high)


def not_so(claim: str, models: Iterable[str]) -> str:
    """A sentence of a claim and the models on which it does not hold; empty if there are none."""
    names = list(models)
    return f"{claim} (not on {', '.join(names)})." if names else ""


def sentences(*texts: str) -> str:
    """Those that are not empty, one after the other."""
    return " ".join(text for text in texts if text)
