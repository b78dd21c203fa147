"""Colours, as numbered classes: the policy forbids `style=` attributes, and print needs few.

A value becomes one of `N_LEVELS` levels, and the level a class (`s0` to `s20` for a
sequential scale, `d0` to `d20` for a diverging one), which the stylesheet colours for light,
dark and print. Blue to yellow-white and blue against orange stay apart for colour-blind readers;
series take the palette of Okabe and Ito and differ in dash and marker as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

N_LEVELS = 21

# Okabe and Ito's colours, darkest first; yellow left out because it vanishes on paper.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
SERIES_DARK = ("#5ab0f0", "#ff9a56", "#3ecfa3", "#e79fc7", "#9bd4ff", "#ffc845")


_SCALES = {
    ("s", "light"): ("#ffffff", "#d6e6f4", "#9cc6e3", "#4f96cb", "#1c61a8", "#08306b"),
    ("s", "dark"): ("#17202b", "#173c5f", "#1d659c", "#4b97d0", "#a3cdec", "#f2f9ff"),
    ("d", "light"): ("#08407e", "#2f7fbc", "#a5cde6", "#f7f7f7", "#fdc28c", "#e36c0a", "#8c3503"),
    ("d", "dark"): ("#a9d6ff", "#4a9be0", "#1d4f7d", "#20262e", "#7d3f12", "#e0802f", "#ffd3a3"),
}


def level(value: float, low: float, high: float) -> int | None:
    """The level of a value on a scale from `low` to `high`; None if it is NaN."""
    if math.isnan(value):
        return None
    if high <= low:
        return 0
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return round(share * (N_LEVELS - 1))


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _mix(anchors: Sequence[str], share: float) -> list[int]:
    position = share * (len(anchors) - 1)
    index = min(int(position), len(anchors) - 2)
    fraction = position - index
    return [
        round(a + (b - a) * fraction)
        for a, b in zip(_channels(anchors[index]), _channels(anchors[index + 1]), strict=True)
    ]


def _luminance(channels: Sequence[int]) -> float:
    """WCAG's relative luminance."""
    linear = [
        c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4
        for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def classes(mode: str) -> str:
    """The stylesheet's rules for all levels in `mode` (light or dark), text colour included."""
    rules = []
    for (kind, scale_mode), anchors in _SCALES.items():
        if scale_mode != mode:
            continue
        for index in range(N_LEVELS):
            channels = _mix(anchors, index / (N_LEVELS - 1))
            ink = "#000" if _luminance(channels) > 0.18 else "#fff"
            colour = "#" + "".join(f"{c:02x}" for c in channels)
            paint = f"background:{colour};fill:{colour};color:{ink};--ink:{ink}"
            rules.append(f".{kind}{index}{{{paint}}}")
    for index, colour in enumerate(SERIES if mode == "light" else SERIES_DARK):
        rules.append(f".c{index}{{--c:{colour}}}")
    return "".join(rules)
