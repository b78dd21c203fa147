"""Which heads does every subnetwork share?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companions_page.rows import Row, mean_row, not_so, sentences
from companions_page.subjects import SEED, Subject, shipped

import memcircuits as mc
from memcircuits.evidence.subnetworks.results import SETS, Core
from memcircuits.organism.delta import HEAD

PAPER_FOUND = (
    "Twelve subnetworks of half of BERT do MNLI about as well as the whole (80.1 to 81.9 % "
    "against 83.3 %) and differ on sentences that need syntax (2.2 to 36.1 % against 86.7 % on "
    "swapped subjects and objects); all of them share a set of heads."
)
MEASURED = (
    "Masks over heads and MLPs keep half of them; a closed part gives its mean over controls. "
    "EM and accuracy (share of tokens that are the greedy choice) are measured on paragraphs "
    "that no mask was trained on, where there are eight. Numbers of heads have no interval: all "
    "subnetworks were counted."
)
ONE_TOKEN = 1.0
"""Loss of EM up to which a subnetwork recites about as well as the whole model."""


def section_core(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Cores of recitations and of ordinary text, and how often chance makes one."""
    rows: list[Row] = []
    worse, nothing_shared = [], []
    sizes = subjects[0].sizes
    # It is run once more for every shuffle, so that half of the masks have to do.
    truth = shipped("organism-planted", sizes._replace(masks=max(2, sizes.masks // 2)))
    for subject in [*subjects, truth]:
        sizes = subject.sizes
        result = mc.core(
            subject.model,
            subject.memorized,
            subject.control,
            seeds=sizes.masks,
            steps=sizes.steps,
            max_paragraphs=sizes.masked,
            shuffles=sizes.shuffles if subject is truth else 0,
            seed=SEED,
            progress=False,
        )
        rows += numbers(subject, result)
        em = result.effects().set_index(["set", "condition"])["em"]
        if em["memorized", "whole"] - em["memorized", "subnetworks"] > ONE_TOKEN:
            worse.append(subject.name)
        if not result.heads("memorized"):
            nothing_shared.append(subject.name)
        if subject is truth:
            rows += known_truth(subject, result)
    return {
        "question": "Which heads does every subnetwork that recites share?",
        "paper": "Bhaskar, Friedman and Chen 2024",
        "arxiv": "2403.03942",
        "paper_models": "BERT, RoBERTa and GPT-2, trained on MNLI and QQP",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": sentences(
            not_so("Half of the model does about as well as the whole", worse),
            not_so("All subnetworks share some heads", nothing_shared),
        ),
    }


def numbers(subject: Subject, result: Core) -> list[Row]:
    """Sizes, cores and what they recite, of one model."""
    rows: list[Row] = []
    name, n = subject.name, len(subject.memorized)
    n_seeds, n_parts = result.kept.shape[1:]
    for of, sizes in zip(("recitations", "ordinary text"), result.effective_size, strict=True):
        what = f"effective size for {of}, share of {n_parts} parts, over {n_seeds} seeds"
        rows.append(mean_row(name, what, sizes.float() / n_parts)._replace(n=n))
    for of in SETS:
        what = f"heads in every subnetwork, {of}"
        rows.append(Row(name, n, SEED, what, len(result.heads(of))))
    rows.append(Row(name, n, SEED, "of these only for memorized", len(result.own_heads)))
    effects = result.effects().set_index(["set", "condition"])
    for condition in ("whole", "subnetworks", "only memorized", "without memorized"):
        line = effects.loc[("memorized", condition)]
        for measure in ("em", "accuracy"):
            interval = (line[measure], line[f"{measure}_low"], line[f"{measure}_high"])
            what = f"{measure} of recitations, {condition}"
            rows.append(Row(name, int(line["n"]), SEED, what, *interval))
    return rows


def known_truth(subject: Subject, result: Core) -> list[Row]:
    """How often the written head is kept, and how often shuffled labels make a core."""
    n, rate = len(subject.memorized), result.false_core_rate
    share = float(result.share("memorized")[mc.Head.parse(HEAD)])
    what = f"heads in one core only, labels shuffled {len(rate)} times, share"
    return [
        Row(subject.name, n, SEED, f"subnetworks with {HEAD}, the written head, share", share),
        Row(subject.name, n, SEED, what, float(rate.mean())),
    ]
