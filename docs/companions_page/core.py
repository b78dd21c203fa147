"""Which heads does every subnetwork share?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companions_page.rows import Row
from companions_page.subjects import Subject, shipped

import memcircuits as mc
from memcircuits.base.statistics import bootstrap_interval
from memcircuits.evidence.subnetworks.results import SETS, Core

SEED = 0
WRITTEN = mc.Head(3, 5)  # through which the four paragraphs of organism-planted were written
SHUFFLES = 2
PAPER_FOUND = (
    "Twelve subnetworks of half of BERT do MNLI about as well as the whole (80.1 to 81.9 % "
    "against 83.3 %) and differ on sentences that need syntax (2.2 to 36.1 % against 86.7 % on "
    "swapped subjects and objects); all of them share a set of heads."
)
MEASURED = (
    "Masks over heads and MLPs keep half of them; a closed part gives its mean over controls. "
    "EM and accuracy (share of tokens that are the greedy choice) are measured on paragraphs "
    "that no mask was trained on, where there are eight."
)


def section_core(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Cores of recitations and of ordinary text, and how often chance makes one."""
    rows: list[Row] = []
    worse = []
    for subject in [*subjects, shipped("organism-planted")]:
        is_planted = subject.name == "organism-planted"
        options = {"seeds": 2, "steps": 40, "max_paragraphs": 8} if subject.is_large else {}
        result = mc.core(
            subject.model,
            subject.memorized,
            subject.control,
            seed=SEED,
            shuffles=SHUFFLES if is_planted else 0,
            progress=False,
            **options,
        )
        rows += numbers(subject, result)
        effects = result.effects().set_index(["set", "condition"])
        lost = (
            effects.loc[("memorized", "whole")]["em"]
            - effects.loc[("memorized", "subnetworks")]["em"]
        )
        if lost > 1:
            worse.append(subject.name)
        if is_planted:
            name, n = subject.name, len(subject.memorized)
            share = float(result.share("memorized")[WRITTEN])
            rows.append(Row(name, n, SEED, f"subnetworks with {WRITTEN}, share", share))
            rate = float(result.false_core_rate.mean())
            what = f"heads in one core only, labels shuffled {SHUFFLES} times, share"
            rows.append(Row(name, n, SEED, what, rate))
    return {
        "question": "Which heads does every subnetwork that recites share?",
        "paper": "Bhaskar, Friedman and Chen 2024",
        "arxiv": "2403.03942",
        "paper_models": "BERT, RoBERTa and GPT-2, trained on MNLI and QQP",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": (
            "That half of the model does the task as well as the whole: on "
            f"{', '.join(worse)} subnetworks recite clearly fewer tokens."
            if worse
            else ""
        ),
    }


def numbers(subject: Subject, result: Core) -> list[Row]:
    """Sizes, cores and what they recite, of one model."""
    rows: list[Row] = []
    name, n = subject.name, len(subject.memorized)
    n_seeds, n_parts = result.kept.shape[1:]
    for of, sizes in zip(("recitations", "ordinary text"), result.effective_size, strict=True):
        share = sizes.float()[:, None] / n_parts
        low, high = bootstrap_interval(share, seed=SEED)[:, 0].tolist()
        what = f"effective size for {of}, share of {n_parts} parts, over {n_seeds} seeds"
        rows.append(Row(name, n, SEED, what, float(share.mean()), low, high))
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
