"""How do recited texts differ from others, at the surface and inside the model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companions_page.rows import Row, not_so, sentences
from companions_page.subjects import SEED, Subject

import memcircuits as mc

PAPER_FOUND = (
    "Longer words are memorized less, memorized samples are predicted with more confidence, and "
    "the hidden states of one concept are more alike across contexts (from the abstract)."
)
MEASURED = (
    "Differences of means, memorized minus control; of hidden states those of the last layer, with "
    "the AUC, the probability that a recited paragraph has the larger value, and its q-value over "
    "all features of the model. Text features are those of the continuation; the same text has the "
    "same in every model. Paragraphs are compared here, not occurrences of one concept, so the "
    "third finding is not asked for: the cosine is that with the other paragraphs of the set."
)
SURFACE = ("characters per word", "characters per token", "rarity", "compressed size", "p mean")
HIDDEN = ("norm", "variance", "cosine", "direction", "stability")


def section_contrast(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Text, probability, and the last layer's hidden states."""
    rows: list[Row] = []
    not_shorter, not_surer = [], []
    for subject in subjects:
        sets = subject.drawn(subject.sizes.contrasted)
        result = mc.contrast(
            subject.model, *sets, unigrams=subject.unigrams, seed=SEED, progress=False
        )
        frame, n = result.to_frame(), len(sets[0])
        for line in frame[frame["feature"].isin(SURFACE)].itertuples():
            bounds = line.difference, line.ci_low, line.ci_high
            rows.append(Row(subject.name, n, SEED, f"difference of {line.feature}", *bounds))
            if line.feature == "characters per word" and not line.ci_high < 0:
                not_shorter.append(subject.name)
            if line.feature == "p mean" and not line.ci_low > 0:
                not_surer.append(subject.name)
        last = frame[(frame["layer"] == frame["layer"].max()) & frame["feature"].isin(HIDDEN)]
        for line in last.itertuples():
            q = f"AUC {line.auc:.2f}, q = {line.q_value:.2g}"
            what = f"difference of {line.feature}, {line.place} ({q})"
            bounds = line.difference, line.ci_low, line.ci_high
            rows.append(Row(subject.name, n, SEED, what, *bounds))
    return {
        "question": "How do recited texts differ from others?",
        "paper": "Li, Zhao and Wen 2024",
        "arxiv": "2403.00510",
        "paper_models": "large language models, on idioms, terms and facts",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": sentences(
            not_so("Memorized texts have shorter words", not_shorter),
            not_so("Memorized texts are predicted with more confidence", not_surer),
        ),
    }
