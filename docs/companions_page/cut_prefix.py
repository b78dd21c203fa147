"""What if a prefix is cut inside a token?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companions_page.rows import Row, not_so
from companions_page.subjects import SEED, Subject

import memcircuits as mc

CUTS = range(8)  # bytes after the end of the prefix
PLACES = ("inside a token", "all")
PAPER_FOUND = (
    "A prompt that ends inside a token costs accuracy. Taking back up to three tokens and choosing "
    "among those that agree with the removed text restores it, for a few milliseconds."
)
MEASURED = (
    f"Each prefix is cut 0 to {len(CUTS) - 1} bytes after its end. Naive: the text before the cut "
    "is encoded. Aligned: up to three tokens are chosen anew. Marginal: the probability over all "
    "token sequences that agree with the text. Missed: aligned minus naive, the share of "
    "recitations that an audit does not see. Accuracies of tasks and times were not measured."
)


def section_cut_prefix(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Share recited in full, by the place of the cut."""
    rows: list[Row] = []
    no_loss = []
    for subject in subjects:
        recited, _ = subject.drawn(subject.sizes.cut)
        result = mc.cut_prefix(subject.model, recited, tuple(CUTS), progress=False)
        frame = result.by_place().set_index(["place", "measure"])
        for place in PLACES:
            line = frame.loc[(place, "in full")]
            cuts = "all cuts" if place == "all" else f"cuts {place}"
            for way in ("naive", "aligned", "marginal", "missed"):
                bounds = float(line[way]), float(line[f"{way}_low"]), float(line[f"{way}_high"])
                what = f"recited in full, {cuts}: {way}"
                rows.append(Row(subject.name, int(line["n"]), SEED, what, *bounds))
        if not frame.loc[("inside a token", "in full")]["missed_low"] > 0:
            no_loss.append(subject.name)
    return {
        "question": "What is recited when the prefix is cut inside a token?",
        "paper": "Athiwaratkun et al. 2024",
        "arxiv": "2403.08688",
        "paper_models": "models of code and text",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": not_so("Alignment restores what a cut inside a token costs", no_loss),
    }
