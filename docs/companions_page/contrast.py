"""How do recited texts differ from others, at the surface and inside the model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from companions_page.rows import Row
from companions_page.subjects import Subject

import memcircuits as mc

SEED = 0
N_PARAGRAPHS = 40
PAPER_FOUND = (
    "Longer words are memorized less, memorized samples are predicted with more confidence, and "
    "the hidden states of one concept are more alike across contexts (from the abstract)."
)
MEASURED = (
    "Differences of means, memorized minus control, with intervals; for hidden states of the last "
    "layer the AUC, the probability that a recited paragraph has the larger value, without one. "
    "Text features are those of the continuation and the same for every model."
)
SURFACE = ("characters per word", "characters per token", "rarity", "compressed size", "p mean")
HIDDEN = ("norm", "cosine", "direction")


def section_contrast(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Text, probability, and the last layer's hidden states."""
    rows: list[Row] = []
    for subject in subjects:
        generator = torch.Generator().manual_seed(SEED)
        sets = [of.sample(N_PARAGRAPHS, generator) for of in (subject.memorized, subject.control)]
        unigrams = None if subject.is_large else mc.UnigramTable.shipped()
        result = mc.contrast(subject.model, *sets, unigrams=unigrams, seed=SEED, progress=False)
        frame, n = result.to_frame(), len(sets[0])
        for line in frame[frame["feature"].isin(SURFACE)].itertuples():
            bounds = line.difference, line.ci_low, line.ci_high
            rows.append(Row(subject.name, n, SEED, f"difference of {line.feature}", *bounds))
        last = frame[(frame["layer"] == frame["layer"].max()) & frame["feature"].isin(HIDDEN)]
        for line in last.itertuples():
            what = f"AUC of {line.feature}, {line.place} (q = {line.q_value:.2g})"
            rows.append(Row(subject.name, n, SEED, what, line.auc))
    return {
        "question": "How do recited texts differ from others?",
        "paper": "Li, Zhao and Wen 2024",
        "arxiv": "2403.00510",
        "paper_models": "large language models, on idioms, terms and facts",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": "hidden states of recited continuations are less alike than those of "
        "controls, not more; here paragraphs are compared, not occurrences of one concept.",
    }
