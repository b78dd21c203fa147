"""How the cost grows with paragraphs, heads, layers, vocabulary and length.

Ours against one hooked forward per head. `python -m tests.benchmarks.growth` measures this part of
docs/benchmarks.md alone.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from memcircuits.base.heads import Head
from memcircuits.evidence.ablation import Ablation
from memcircuits.models.loading import as_bridge
from memcircuits.organism import DATA
from tests.benchmarks import rivals
from tests.benchmarks.subjects import random_neo, random_paragraphs
from tests.benchmarks.timing import Contender, seconds

SIZES: dict[str, Sequence[int]] = {
    "paragraphs": (1, 2, 4, 8, 16),
    "heads per layer": (2, 4, 8, 16),
    "layers": (2, 4, 8, 16),
    "vocabulary": (1024, 4096, 16384, 65536),
    "tokens": (50, 100, 200, 400),
}
BASE = {"paragraphs": 4, "heads per layer": 4, "layers": 4, "vocabulary": 2048, "tokens": 100}
D_MODEL = 128


def measure(tokenizer: Any, rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Seconds to zero-ablate every head, one size grown at a time, the others as in `BASE`."""
    rows = []
    for axis, sizes in SIZES.items():
        for size in sizes[:2] if quick else sizes:
            shape = BASE | {axis: size}
            plain = random_neo(
                shape["layers"], shape["heads per layer"], D_MODEL, shape["vocabulary"]
            )
            model = as_bridge(plain, tokenizer, name="grown")
            paragraphs = random_paragraphs(
                shape["paragraphs"], shape["vocabulary"], n_tokens=shape["tokens"]
            )
            heads = [
                Head(layer, head)
                for layer in range(shape["layers"])
                for head in range(shape["heads per layer"])
            ]
            zero = Ablation(model, paragraphs, mode="zero")
            ours = Contender(
                "memcircuits",
                lambda turn, setting, zero=zero, heads=heads: zero.effects(heads, progress=False),
                1,
            )
            theirs = Contender(
                "one hooked forward per head",
                lambda turn, setting, model=model, rows=paragraphs, heads=heads: rivals.ablate_lens(
                    model, rows.ids, len(rows), heads
                ),
                1,
            )
            times: dict[str, list[float]] = {ours.name: [], theirs.name: []}
            for turn in range(rounds + 1):
                for contender in (ours, theirs):
                    times[contender.name].append(seconds(contender, turn, None))
            for name, values in times.items():
                rows.append(
                    {
                        "axis": axis,
                        "size": size,
                        "name": name,
                        "seconds": statistics.median(values[1:]),
                    }
                )
    return rows


COLOURS = ("#0072b2", "#d55e00")
WIDTH, HEIGHT, MARGIN = 250, 210, 44


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a picture of its own (SVG), one panel per size, both axes logarithmic."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    every = [row["seconds"] for row in rows]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(axes)}" '
        f'height="{HEIGHT + 30}" font-family="sans-serif" font-size="11" role="img">',
        "<title>Seconds to ablate every head, against the size of each part</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for panel, axis in enumerate(axes):
        left, right = panel * WIDTH + MARGIN, (panel + 1) * WIDTH - 12
        top, bottom = 34, HEIGHT - 12
        axis_rows = [row for row in rows if row["axis"] == axis]
        sizes = sorted({row["size"] for row in axis_rows})
        span = math.log(sizes[-1] / sizes[0]) or 1.0

        def x(size: float, left=left, right=right, sizes=sizes, span=span) -> float:
            return left + 8 + math.log(size / sizes[0]) / span * (right - left - 16)

        def y(value: float, top=top, bottom=bottom) -> float:
            return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

        for power in range(low, high + 1):
            at = y(10.0**power)
            parts.append(
                f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            )
            parts.append(
                f'<text x="{left - 5}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>'
            )
        parts += [
            f'<text x="{x(size):.1f}" y="{bottom + 15}" text-anchor="middle">{size}</text>'
            for size in sizes
        ]
        middle = (left + right) / 2
        parts.append(
            f'<text x="{middle:.0f}" y="{bottom + 31}" text-anchor="middle">'
            f"{html.escape(axis)}</text>"
        )
        for i, name in enumerate(names):
            points = [(x(r["size"]), y(r["seconds"])) for r in axis_rows if r["name"] == name]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            dash = ' stroke-dasharray="5 3"' if i else ""
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{COLOURS[i]}" '
                f'stroke-width="2"{dash}/>'
            )
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{COLOURS[i]}"/>' for a, b in points
            ]
    for i, name in enumerate(names):
        at = MARGIN + i * 160
        dash = ' stroke-dasharray="5 3"' if i else ""
        parts.append(
            f'<line x1="{at}" x2="{at + 24}" y1="16" y2="16" stroke="{COLOURS[i]}" '
            f'stroke-width="2"{dash}/><text x="{at + 30}" y="20">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    from tests.benchmarks import page

    folder = page.FINDINGS.parent
    data = json.loads((folder / page.NUMBERS).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(DATA, local_files_only=True)
    rows = measure(tokenizer, rounds=3, quick=False)
    page.write(data | {"growth": rows}, folder)


if __name__ == "__main__":
    main()
