"""One component at a time: what is known of the head that a reader clicked.

The block shows nothing by itself; its script fills it when a link of the page leads to the name of
a component, such as a cell of the heat map. Everything shown was measured before and lies in the
page as one JSON block, attention in a short form: of each query that predicts a token of the
continuation, the few keys with most attention.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from memcircuits.base.errors import InputError
from memcircuits.display.numbers import array
from memcircuits.display.pages.blocks import Block
from memcircuits.display.text import visible

WEIGHT_STEPS = 250
"""Attention is stored in steps of 1/250."""


class Estimate(NamedTuple):
    """A value with its interval: what it is (`label`); `low` and `high` are NaN without one."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ParagraphText:
    """The tokens of a paragraph that attention is shown on.

    Attributes:
        name: its name.
        tokens: text of each token, those in front of it included.
    """

    name: str
    tokens: Sequence[str]


@dataclass(frozen=True)
class HeadOnParagraph:
    """What one head does on one paragraph, at each position that predicts the continuation.

    Attributes:
        keys: positions attended to most, [query, place].
        weights: attention to them, in [0, 1], [query, place].
        writes: what the head adds directly to the logit of the true next token, [query]; empty if
            that is not known.
    """

    keys: Any
    weights: Any
    writes: Any = ()

    def packed(self, n_tokens: int) -> dict[str, Any]:
        """Bytes as base64: keys, then weights; and the written logits in steps of 1/127."""
        keys = np.asarray(self.keys).astype("<u2" if n_tokens > 256 else "u1")
        weights = np.rint(array(self.weights) * WEIGHT_STEPS).astype("u1")
        data: dict[str, Any] = {"attention": _text_of(keys.tobytes() + weights.tobytes())}
        writes = array(self.writes)
        if writes.size:
            largest = float(np.abs(writes).max()) or 1.0
            steps = np.rint(writes / largest * 127).astype("i1")
            data |= {"largest": float(f"{largest:.4g}"), "writes": _text_of(steps.tobytes())}
        return data


@dataclass(frozen=True)
class ComponentDetails:
    """What is known of one component.

    Attributes:
        facts: name of a number -> the number as text.
        estimates: its score under several choices.
        effects: set -> effect of its ablation on each group of paragraphs, nats/token.
        top_tokens: tokens that it writes most, with the mean logit that it adds to each.
        on_paragraphs: what it does on the first paragraphs of the block, in their order.
        attends: whether it is a head; the others have no attention to show.
    """

    facts: Mapping[str, str]
    estimates: Sequence[Estimate] = ()
    effects: Mapping[str, Sequence[float]] = field(default_factory=dict)
    top_tokens: Sequence[tuple[str, float]] = ()
    on_paragraphs: Sequence[HeadOnParagraph] = ()
    attends: bool = True


@dataclass(frozen=True)
class Explorer(Block):
    """The component that the reader chose; at first, the first one.

    Attributes:
        components: name -> details, best first.
        paragraphs: the paragraphs that attention is shown on.
        first_query: position of the first query, the one that predicts the continuation.
        losses: set -> loss of the whole model on each group of paragraphs, nats/token.
        units: unit of scores and effects.
        missing: what to tell of a paragraph or head without attention.
        few: what to tell of a component with a single estimate.
    """

    template: ClassVar[str] = "explorer.html.j2"
    components: Mapping[str, ComponentDetails]
    paragraphs: Sequence[ParagraphText] = ()
    first_query: int = 0
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    units: str = ""
    missing: str = ""
    few: str = ""

    def __post_init__(self) -> None:
        """Check that there is a component, and that no one has more paragraphs than there are."""
        if not self.components:
            raise InputError("components", "none", "leave the block out: there is nothing to show")
        most = max(len(details.on_paragraphs) for details in self.components.values())
        if most > len(self.paragraphs):
            remedy = f"paragraphs has {len(self.paragraphs)}"
            raise InputError("on_paragraphs", f"{most} entries", remedy)

    def context(self) -> dict[str, Any]:
        """The data block."""
        return {
            "data": {
                "names": list(self.components),
                "components": [self._packed(details) for details in self.components.values()],
                "paragraphs": [
                    {
                        "name": visible(paragraph.name, 40, tell=False),
                        "tokens": [visible(token, 24, tell=False) for token in paragraph.tokens],
                    }
                    for paragraph in self.paragraphs
                ],
                "firstQuery": self.first_query,
                "losses": {name: _rounded(values) for name, values in self.losses.items()},
                "units": self.units,
                "missing": self.missing,
                "few": self.few,
            },
            "names": list(self.components),
        }

    def _packed(self, details: ComponentDetails) -> dict[str, Any]:
        return {
            "facts": list(details.facts.items()),
            "attends": details.attends,
            "estimates": [
                [e.label, *_rounded([e.value, e.low, e.high])] for e in details.estimates
            ],
            "effects": {name: _rounded(values) for name, values in details.effects.items()},
            "topTokens": [
                [visible(token, 24, tell=False), *_rounded([logit])]
                for token, logit in details.top_tokens
            ],
            "onParagraphs": [
                one.packed(len(paragraph.tokens))
                for one, paragraph in zip(details.on_paragraphs, self.paragraphs, strict=False)
            ],
        }


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Four significant digits; None where there is no number."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in array(values).tolist()]


def _text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
