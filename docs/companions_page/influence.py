"""Which text teaches which, and what does forgetting one harm?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from companions_page.rows import Row
from companions_page.subjects import Subject

import memcircuits as mc
from memcircuits.base.statistics import bootstrap_interval

SEED = 0
N_TESTED = 12
N_UNLEARNED = 4  # each costs an edit
DAMAGE = (20, 10, 5)  # in a near copy, one token in 20, 10 or 5 is replaced
PAPER_FOUND = (
    "Phrases of the same structure in one context teach each other: removing them from the "
    "training data costs 51.1 % of in-context learning, removing random ones 1.5 %."
)
MEASURED = (
    "One gradient step (1e-6) on each text, and the change of log p of each recitation. A teacher "
    "is the text that helps a recitation most per length of its step; candidates are near copies "
    "of the recitations, in which every 20th, 10th or 5th token is another, and as many controls. "
    "Harm is the change of log p of other recitations after `unlearn` of one paragraph."
)


def section_influence(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Own influence, teachers named, and harm predicted."""
    rows: list[Row] = []
    for subject in subjects:
        generator = torch.Generator().manual_seed(SEED)
        recited = subject.memorized.sample(8 if subject.is_large else N_TESTED, generator)
        control = subject.control.sample(len(recited), generator)
        rows += own_influence(subject, recited, control)
        for damage in DAMAGE[:1] if subject.is_large else DAMAGE:
            rows.append(teachers_named(subject, recited, control, damage))
        if not subject.is_large:
            rows += harm_predicted(subject, recited)
    return {
        "question": "Which text teaches which, and what does forgetting one harm?",
        "paper": "Chen et al. 2024",
        "arxiv": "2402.12530",
        "paper_models": "GPT-2 and OPT",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": "in-context learning was not measured; a step on a recited text does not "
        "always help that text most: it helps recitations at large.",
    }


def own_influence(subject: Subject, recited: mc.Paragraphs, control: mc.Paragraphs) -> list[Row]:
    """How often a text's own log-probability is what a step on it raises most."""
    result = mc.influence(subject.model, recited + control, progress=False)
    own = result.values.argmax(1) == torch.arange(len(result.trained))
    of = {"recitations": own[: len(recited)], "controls": own[len(recited) :]}
    return [
        row(subject, f"own influence is the largest of its row, {name}, share", values.float())
        for name, values in of.items()
    ]


def teachers_named(
    subject: Subject, recited: mc.Paragraphs, control: mc.Paragraphs, damage: int
) -> Row:
    """How often the near copy of a recitation is named as its teacher."""
    ids = recited.ids.clone()
    ids[:, 2::damage] = control.ids[:, 2::damage]
    copies = mc.Paragraphs(ids, recited.n_prefix, recited.names, bos=recited.bos)
    others = mc.Paragraphs(control.ids, control.n_prefix, control.names, bos=control.bos)
    candidates = copies + others
    teachers = mc.influence(subject.model, candidates, recited, progress=False).teachers()
    named = torch.tensor((teachers["own_rank"] == 1).tolist()).float()
    return row(subject, f"near copy (1 token in {damage} changed) named, share", named)


def harm_predicted(subject: Subject, recited: mc.Paragraphs) -> list[Row]:
    """Rank correlation of an unlearning step's influence with what unlearning does to others."""
    model, targets = subject.model, recited[:N_UNLEARNED]
    before = mc.scan(model, recited, progress=False).log_prob
    guards = subject.control[:20]
    harm = []
    for target in targets:
        with mc.unlearn(model, target, guards, progress=False).apply(model):
            harm.append(mc.scan(model, recited, progress=False).log_prob - before)
    step = mc.influence(model, targets, recited, -1e-6, progress=False)
    mean, low, high = step.rank_correlation(torch.stack(harm), seed=SEED)
    others = torch.stack(harm)[torch.arange(len(targets))[:, None] != torch.arange(len(recited))]
    what = "rank correlation of a step's influence with the harm of unlearning"
    return [
        Row(subject.name, len(targets), SEED, what, mean, low, high),
        row(subject, "change of log p of other recitations, nats", others),
    ]


def row(subject: Subject, what: str, values: torch.Tensor) -> Row:
    low, high = bootstrap_interval(values, seed=SEED).tolist()
    return Row(subject.name, len(values), SEED, what, float(values.mean()), low, high)
