"""Which neurons write the next token, and which heads call them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companions_page.rows import Row, not_so
from companions_page.subjects import SEED, Subject

import memcircuits as mc

PAPER_FOUND = (
    "An explanation by GPT-4 tells in which prompts a head is active: mean of the two rates of "
    "correct answers 0.639, 0.616 and 0.602, for random neurons 0.558. Removing a head "
    "separates prompts in which it is active from others by a Kolmogorov-Smirnov distance of "
    "0.242 to 0.331."
)
MEASURED = (
    "A head called active for a neuron on half of its prompts is removed from what the neuron's "
    "MLP reads, on the other half. AUC: the probability that the activation falls more than "
    "without a head that was not called. Neurons are resampled. The paper compares prompts, "
    "this comparison heads, so that the two distances are not the same quantity; pairs of one "
    "neuron depend on each other, so the distance has no interval."
)


def section_lookups(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Next-token neurons and random ones: do heads called active hold on other prompts?"""
    rows: list[Row] = []
    not_special = []
    for subject in subjects:
        given = subject.memorized + subject.control
        result = mc.lookups(
            subject.model,
            given,
            neurons=subject.sizes.neurons,
            max_paragraphs=subject.sizes.looked_up,
            seed=SEED,
            progress=False,
        )
        n = len(result.names)
        summary = result.summary().set_index("neurons")
        for kind, line in summary.iterrows():
            what = f"AUC, {kind}" + (f" ({line['n']:.0f} neurons)" if line["n"] else "")
            interval = (line["auc"], line["auc_low"], line["auc_high"])
            rows.append(Row(subject.name, n, SEED, what, *interval))
            rows.append(Row(subject.name, n, SEED, f"Kolmogorov-Smirnov, {kind}", line["ks"]))
        if not summary.loc["difference", "auc_low"] > 0:
            not_special.append(subject.name)
    return {
        "question": "Which neurons write the next token, and which heads call them?",
        "paper": "Neo, Cohen and Barez 2024",
        "arxiv": "2402.15055",
        "paper_models": "GPT-2 small, medium and large",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": not_so(
            "Heads called active hold better for next-token neurons than for random ones",
            not_special,
        ),
    }
