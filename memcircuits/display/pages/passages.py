"""Passages that a model recites, as text: what was given, what was recited, and where it went on.

Each passage is an article with a heading, its numbers and its text; the recited part is marked. A
script searches the texts, filters them by kind and sorts them; without it, and on paper, all of
them stand in the order given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from memcircuits.base.errors import InputError
from memcircuits.display.pages.blocks import Block
from memcircuits.display.text import number


@dataclass(frozen=True)
class Passage:
    """One passage.

    Attributes:
        name: its name.
        kind: what it is filtered by, such as "memorized".
        prefix: the text that the model was given.
        recited: the beginning of the continuation that the model wrote too.
        remainder: the remainder of the true continuation.
        n_recited: number of tokens of `recited`.
        nll: mean loss of the continuation, nats/token.
        details: what else is known, in words.
    """

    name: str
    kind: str
    prefix: str
    recited: str
    remainder: str
    n_recited: int
    nll: float
    details: str = ""


@dataclass(frozen=True)
class Passages(Block):
    """A list of passages, with a search field, a filter and an order to choose.

    Attributes:
        passages: the passages, the most important first.
        n_continuation: tokens of a continuation.
        total: number of passages that there are; more than are shown is told.
        page_size: number of passages shown at a time.
    """

    template: ClassVar[str] = "passages.html.j2"
    scripts: ClassVar[tuple[str, ...]] = ("passages",)
    passages: Sequence[Passage]
    n_continuation: int
    total: int
    page_size: int = 20

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("n_continuation", "page_size"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "give 1 or more")

    def context(self) -> dict[str, Any]:
        """Every passage with its number, its place and its numbers as text."""
        return {
            "entries": [
                {
                    "passage": passage,
                    "place": f"passage-{index}",
                    "share": round(100 * passage.n_recited / self.n_continuation),
                    "nll": number(passage.nll),
                }
                for index, passage in enumerate(self.passages)
            ],
            "kinds": list(dict.fromkeys(passage.kind for passage in self.passages)),
            "left_out": self.total - len(self.passages),
        }
