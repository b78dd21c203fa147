"""What an audit means, in words.

The verdict compares the edited model with the unedited one and with the reference:

| verdict | when |
| --- | --- |
| not touched | every target is recited as before, and its distribution moved less than 1 % of the way |
| still recited | half of the recitation is left behind the own prefix |
| hidden | some way brings half of the recitation back, or less than half of the depth is reached |
| erased to the reference within noise | depth at least 0.8, at most a tenth of the remembered bits left, and no way brings back more than 2 tokens more than the reference recites |
| weakened | anything between |

The ways back are attacked prefixes, entries in the middle of the continuation, rounding of the
weights, and training. What a way brings back is counted beyond the reference, as a share of what
the unedited model recites. The depth and the remembered bits enter with the bound of their 95 %
interval that speaks against the edit; one independent group has no interval, and its value counts.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal[
    "not touched", "still recited", "hidden", "weakened", "erased to the reference within noise"
]

MOVED = 0.01
"""Share of the distance to the reference below which a text counts as not touched."""

BACK = 0.5
"""Share of the recitation at which a way counts as bringing it back."""

DEPTH, LEFT, SLACK = 0.8, 0.1, 2.0
"""Smallest depth, largest share of remembered bits, and tokens beyond the reference, if erased."""


_ERASED = (
    f"the depth is at least {DEPTH}, at most {LEFT * 100:.0f} % of the remembered bits are left, "
    f"and no way brings back more than {SLACK:.0f} tokens more than the reference recites"
)
MEANINGS: dict[Verdict, str] = {
    "not touched": "the text is recited as before",
    "still recited": "half of the recitation is left behind the own prefix",
    "hidden": f"some way brings half of the recitation back, or the depth is below {BACK}",
    "weakened": f"more than hidden and less than erased; erased means that {_ERASED}",
    "erased to the reference within noise": _ERASED,
}
"""What each verdict means, in one clause."""


@dataclass(frozen=True)
class Recited:
    """Mean tokens that one way brings back.

    Attributes:
        edited: of the edited model.
        reference: of the reference.
        unedited: of the unedited model, without an attack, rounding or training.
    """

    edited: float
    reference: float
    unedited: float

    @property
    def share(self) -> float:
        """What comes back beyond the reference, as a share of what there was."""
        return (self.edited - self.reference) / max(self.unedited - self.reference, 1.0)


def ways_back(recited: Mapping[str, Recited]) -> tuple[str, ...]:
    """The ways other than the own prefix that bring half of the recitation back."""
    return tuple(name for name, each in recited.items() if name != "em" and each.share >= BACK)


def shortfalls(
    recited: Mapping[str, Recited],
    depth: tuple[float, float],
    remembered: tuple[float, float],
) -> tuple[str, ...]:
    """The conditions of `erased` that an edit does not meet, in words; see `verdict_of`."""
    worst_depth = depth[0] if math.isnan(depth[1]) else depth[1]
    worst_left = remembered[0] if math.isnan(remembered[1]) else remembered[1]
    back, way = max((each.edited - each.reference, name) for name, each in recited.items())
    failed = []
    if not worst_depth >= DEPTH:
        bound = "" if math.isnan(depth[1]) else f", and its interval begins at {depth[1]:.2f}"
        failed.append(f"the depth is {depth[0]:.2f}{bound} (at least {DEPTH})")
    if not worst_left <= LEFT:
        bound = (
            ""
            if math.isnan(remembered[1])
            else f", and the interval ends at {100 * worst_left:.1f} %"
        )
        failed.append(
            f"{100 * remembered[0]:.1f} % of the remembered bits are left{bound} (at most "
            f"{100 * LEFT:.0f} %)"
        )
    if not back <= SLACK:
        failed.append(
            f"{way} brings back {back:.1f} tokens more than the reference recites (at most "
            f"{SLACK:.0f})"
        )
    return tuple(failed)


def verdict_of(
    recited: Mapping[str, Recited],
    depth: tuple[float, float],
    remembered: tuple[float, float],
    *,
    moved: float,
    same_em: bool,
) -> Verdict:
    """The verdict.

    Args:
        recited: way -> tokens that it brings back; among them the own prefix.
        depth: erasure depth, and the lower bound of its interval (NaN: none).
        remembered: share of the remembered bits left, and the upper bound (NaN: none).
        moved: KL(unedited || edited) as a share of KL(unedited || reference), on the targets.
        same_em: whether every target is recited as far as before.
    """
    if same_em and abs(moved) < MOVED:
        return "not touched"
    if recited["em"].share >= BACK:
        return "still recited"
    if ways_back(recited) or not depth[0] >= BACK:
        return "hidden"
    if not shortfalls(recited, depth, remembered):
        return "erased to the reference within noise"
    return "weakened"
