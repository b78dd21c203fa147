"""The plot of memorized EM against harm to controls, as SVG."""

from __future__ import annotations

import html
import math
from typing import Any

from unlearning_page.numbers import mean

COLOURS = {  # and a dash, so that lines can be told apart without colour
    "all": ("#4477aa", ""),
    "top": ("#ee6677", "6 3"),
    "random 0.1 % per matrix": ("#aa7722", "8 3 2 3"),
    "random": ("#888888", "2 3"),
    "ours": ("#228833", ""),
}


def plot(points: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Two panels: memorized EM (down) against the KL, and against the controls' own EM."""
    width, height, gap = 330, 250, 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (width + gap) + 20}" '
        f'height="{height + 75}" font-family="sans-serif" font-size="11" role="img">',
        "<title>Memorized EM against what controls lose</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    costs = [math.log10(mean(group, "kl")) for groups in points.values() for group in groups]
    panels = (
        (
            "KL of unseen controls (nats/token)",
            lambda g: math.log10(mean(g, "kl")),
            math.floor(min(costs)),
            math.ceil(max(costs)),
        ),
        ("unseen controls' own EM (tokens)", lambda g: mean(g, "own"), 0, 50),
    )
    for panel, (label, where, first, last) in enumerate(panels):
        left, top = gap + panel * (width + gap), 14

        def x(value: float, left=left, first=first, last=last) -> float:
            return left + (value - first) / (last - first) * width

        def y(value: float, top=top) -> float:
            return top + (1 - value / 50) * height

        marks = range(first, last + 1) if panel == 0 else range(0, 51, 10)
        for mark in marks:
            text = f"1e{mark}" if panel == 0 else str(mark)
            parts.append(
                f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top}" y2="{top + height}" '
                f'stroke="#ddd"/><text x="{x(mark):.1f}" y="{top + height + 15}" '
                f'text-anchor="middle">{text}</text>'
            )
        parts += [
            f'<line x1="{left}" x2="{left + width}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" '
            f'stroke="#ddd"/><text x="{left - 5}" y="{y(mark) + 4:.1f}" '
            f'text-anchor="end">{mark}</text>'
            for mark in range(0, 51, 10)
        ]
        parts.append(
            f'<text x="{left + width / 2}" y="{top + height + 31}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
        for name, groups in points.items():
            colour, dash = COLOURS[next(key for key in COLOURS if name.startswith(key))]
            at = [(x(where(group)), y(mean(group, "em"))) for group in groups]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" '
                f'stroke-dasharray="{dash}"/>'
            )
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in at]
    parts.append(
        f'<text transform="translate(14 {14 + height / 2}) rotate(-90)" text-anchor="middle">'
        "memorized EM (tokens)</text>"
    )
    for i, name in enumerate(points):
        colour, _ = COLOURS[next(key for key in COLOURS if name.startswith(key))]
        at = gap + 145 * i
        parts.append(
            f'<circle cx="{at}" cy="{height + 62}" r="4" fill="{colour}"/>'
            f'<text x="{at + 8}" y="{height + 66}">{html.escape(name)}</text>'
        )
    return "".join([*parts, "</svg>\n"])
