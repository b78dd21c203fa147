"""What docs/twin.md says first, and README repeats: a few of its numbers, and sentences of them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

UNITS = {"head": "head", "mlp": "MLP", "layer": "layer"}
LOCALIZERS = ("find_memorization_heads", "exact-patching")


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The largest effects, the bits at the largest dose, and agreement with the transplants."""
    weights = numbers["transplants"]["model, weights"]
    components = pd.DataFrame(weights["components"])
    floor = numbers["transplants"].get("noise floor")
    largest = {unit: _largest(components, unit) for unit in UNITS}
    natural = pd.DataFrame(numbers["natural"])
    natural = natural[(natural["direction"] == "model") & (natural["truth"] == "necessity")]
    rows = natural.set_index("localizer")
    fields = ["correlation", "correlation_low", "correlation_high"]
    n_heads = int((components["unit"] == "head").sum())
    return {
        "total": weights["total"],
        "paragraphs": weights["n"],
        "largest": largest,
        "floor": None
        if floor is None
        else {unit: _largest(pd.DataFrame(floor["components"]), unit) for unit in UNITS},
        "bits": _bits(numbers, "twin"),
        "bits_floor": _bits(numbers, "noise twin"),
        "agreement": {
            name: rows.loc[name, fields].to_dict() for name in LOCALIZERS if name in rows.index
        },
        # The size of a rank correlation over these heads that has a two-sided p of 5 %.
        "by_chance": 1.96 / math.sqrt(n_heads - 1),
    }


def _largest(components: pd.DataFrame, unit: str) -> float:
    return float(components[components["unit"] == unit]["necessity"].max())


def _bits(numbers: dict[str, Any], against: str) -> dict[str, Any] | None:
    """Remembered bits of the paragraphs of the model alone that it saw most often."""
    rows = [r for r in numbers["bits"] if (r["against"], r["role"]) == (against, "organism")]
    if not rows:
        return None
    row = max(rows, key=lambda row: row["repetitions"])
    return {name: row[name] for name in ("repetitions", "n", "remembered", "low", "high")}


def sentences(numbers: dict[str, Any]) -> str:
    """The summary in words."""
    bits, largest = numbers["bits"], numbers["largest"]
    parts = [
        f"Of paragraphs that the model saw {bits['repetitions']} times it remembers "
        f"{bits['remembered']:.1f} bits of every token ({bits['low']:.1f} to {bits['high']:.1f}) "
        "beyond the twin"
    ]
    if numbers["bits_floor"] is not None:
        parts[0] += f", and {numbers['bits_floor']['remembered']:.1f} beyond the noise twin"
    parts[0] += "."
    effects = ", ".join(f"of one {name} {largest[unit]:.3f}" for unit, name in UNITS.items())
    parts.append(
        "No component holds them. The model's loss on a paragraph that only it saw rises by "
        f"{numbers['total']:.2f} nats/token with all of the twin's weights; with the twin's "
        f"weights it rises by at most: {effects}."
    )
    if numbers["floor"] is not None:
        floor = ", ".join(f"{name} {numbers['floor'][unit]:.3f}" for unit, name in UNITS.items())
        parts.append(f"A training on the same paragraphs in another order differs by: {floor}.")
    told = [
        f"`{name}` {row['correlation']:.2f} ({row['correlation_low']:.2f} to "
        f"{row['correlation_high']:.2f})"
        for name, row in numbers["agreement"].items()
    ]
    parts.append(
        f"The order of heads agrees with these transplants by a rank correlation of "
        f"{', '.join(told)}; {numbers['by_chance']:.2f} is reached by chance. Ablation says what a "
        "recitation needs, and not where training wrote it."
    )
    return "\n".join(f"- {part}" for part in parts)
