"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memcircuits.core.errors import InputError
from memcircuits.display.numbers import array
from memcircuits.display.pages.blocks import Block
from memcircuits.display.palette import level
from memcircuits.display.text import UNKNOWN, number, short, visible


@dataclass(frozen=True)
class Strip:
    """One number per token, to colour a paragraph by: its `values` and `units`.

    NaN means undefined (the first token has no log-probability) and stays uncoloured. A
    log-probability is read from zero downwards: `reverse` gives the lowest value the darkest
    colour.
    """

    values: Sequence[float]
    units: str = ""
    reverse: bool = False

    def levels(self) -> list[int | None]:
        """The colour level of each token."""
        values = array(self.values)
        values = -values if self.reverse else values
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        return [level(float(v), float(low), float(high)) for v in values]

    def check(self, name: str, n_tokens: int) -> None:
        """Refuse a strip that does not fit its tokens.

        Raises:
            InputError: another length, or an infinite value.
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
    """What the strip template shows for each token: text, part, hover text, first colour.

    Where `others` are given, tokens of the prefix are marked that differ from those at their
    place there, and the first one of the continuation: behind it there is nothing to compare.
    """
    first = next(iter(strips.values())).levels() if strips else [None] * len(tokens)
    shown = []
    parted = False
    for index, token in enumerate(tokens):
        told = [
            f"{name} {number(float(array(s.values)[index]))} {s.units}".strip()
            for name, s in strips.items()
        ]
        differs = others is not None and not parted and (list(others[index : index + 1]) != [token])
        parted = parted or (differs and index >= n_prefix)
        if differs:
            told.append("differs from the paragraph beside it")
        shown.append(
            {
                "differs": differs,
                "text": visible(token),
                "index": index,
                "prefix": index < n_prefix,
                "level": first[index],
                "tip": "; ".join([f"token {index} “{visible(token, 24, tell=False)}”", *told]),
            }
        )
    return shown


@dataclass(frozen=True)
class Tokens(Block):
    """A paragraph's tokens, coloured by one number each; prefix and continuation told apart.

    Attributes:
        tokens: text of each token.
        strip: the numbers.
        name: what they are.
        n_prefix: how many tokens were given as prompt.
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
    """The values at the pale and at the dark end of a strip's colours, as text."""
    values = array(strip.values)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [UNKNOWN, UNKNOWN]
    ends = [short(float(finite.min())), short(float(finite.max()))]
    return ends[::-1] if strip.reverse else ends
