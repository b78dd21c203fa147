"""A paragraph token by token, each token coloured by a number: a strip.

`Tokens` is the block; `strip_tokens` and `strip_scale` also serve the strips below an attention
view (`memcircuits.display.pages.attention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memcircuits.base.errors import InputError
from memcircuits.display.numbers import array
from memcircuits.display.pages.blocks import Block
from memcircuits.display.palette import level
from memcircuits.display.text import UNKNOWN, number, short, visible


@dataclass(frozen=True)
class Strip:
    """One number per token, to colour a paragraph by: its `values` and `units`.

    NaN means undefined (the first token has no log-probability) and stays uncoloured. A
    log-probability is read from zero downwards: `reverse` gives the lowest value the darkest
    colour. `limits` are the values of the lightest and the darkest colour, where several strips are
    to be compared; by default the smallest and the largest number.
    """

    values: Sequence[float]
    units: str = ""
    reverse: bool = False
    limits: tuple[float, float] | None = None

    def levels(self) -> list[int | None]:
        """The colour level of each token."""
        values, (low, high) = array(self.values), self.ends() or (0.0, 1.0)
        if self.reverse:
            values, low, high = -values, -high, -low
        return [level(float(value), low, high) for value in values]

    def ends(self) -> tuple[float, float] | None:
        """The smallest and the largest value of the colours; None without a number."""
        values = array(self.values)
        finite = values[np.isfinite(values)]
        if not finite.size:
            return None
        return self.limits or (float(finite.min()), float(finite.max()))

    def check(self, name: str, n_tokens: int) -> None:
        """Refuse a strip that does not fit its tokens.

        Raises:
            InputError: if the number of values is another, or one is infinite.
        """
        values = array(self.values)
        if values.shape != (n_tokens,):
            raise InputError(
                f"strip {name!r}", f"shape {values.shape}", f"give {n_tokens} values, one per token"
            )
        if np.isinf(values).any():
            raise InputError(f"strip {name!r}", "infinite", "clip it, or give NaN")


def strip_tokens(
    tokens: Sequence[str],
    n_prefix: int,
    strips: Mapping[str, Strip],
    others: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """What the strip template shows of each token: text, part, hover text, level of its colour.

    The colour is that of the first strip. Tokens that differ from those of `others` are marked: all
    of the prefix, but only the first one of the continuation, because later ones follow from it.
    """
    levels = next(iter(strips.values())).levels() if strips else [None] * len(tokens)
    numbers = {name: array(strip.values) for name, strip in strips.items()}
    differs = _differences(tokens, n_prefix, others)
    entries = []
    for index, token in enumerate(tokens):
        tip = [f"token {index} “{visible(token, 24, tell=False)}”"]
        tip += [
            f"{name} {number(float(numbers[name][index]))} {strip.units}".strip()
            for name, strip in strips.items()
        ]
        if differs[index]:
            tip.append("differs from the paragraph beside it")
        entries.append(
            {
                "differs": differs[index],
                "text": visible(token),
                "index": index,
                "prefix": index < n_prefix,
                "level": levels[index],
                "tip": "; ".join(tip),
            }
        )
    return entries


def _differences(tokens: Sequence[str], n_prefix: int, others: Sequence[str] | None) -> list[bool]:
    """Which tokens to mark as different from those of another paragraph."""
    if others is None:
        return [False] * len(tokens)
    differs = [list(others[i : i + 1]) != [token] for i, token in enumerate(tokens)]
    if True in differs[n_prefix:]:
        end = differs.index(True, n_prefix) + 1
        differs[end:] = [False] * (len(tokens) - end)
    return differs


@dataclass(frozen=True)
class Tokens(Block):
    """A paragraph's tokens, coloured by one number each; a mark separates the continuation.

    Attributes:
        tokens: text of each token.
        strip: the numbers.
        name: what they are.
        n_prefix: number of tokens given as prompt.
    """

    template: ClassVar[str] = "tokens.html.j2"
    tokens: Sequence[str]
    strip: Strip
    name: str
    n_prefix: int = 0

    def __post_init__(self) -> None:
        """Check lengths and numbers."""
        self.strip.check(self.name, len(self.tokens))

    def context(self) -> dict[str, Any]:
        """Tokens with colours, and the ends of the scale."""
        return {
            "tokens": strip_tokens(self.tokens, self.n_prefix, {self.name: self.strip}),
            "n_prefix": self.n_prefix,
            "scale": strip_scale(self.strip),
            "name": self.name,
            "units": self.strip.units,
        }


def strip_scale(strip: Strip) -> list[str]:
    """The values at the light and at the dark end of a strip's colours, as text."""
    ends = strip.ends()
    if ends is None:
        return [UNKNOWN, UNKNOWN]
    shown = [short(end) for end in ends]
    return shown[::-1] if strip.reverse else shown
