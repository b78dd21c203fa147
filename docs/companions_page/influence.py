"""Which text teaches which, and what does forgetting one harm?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from companions_page.rows import Row, mean_row, not_so, sentences
from companions_page.subjects import SEED, Subject

import memcircuits as mc

ETA = 1e-6
N_GUARDS = 20  # controls whose predictions an edit is to keep
PAPER_FOUND = (
    "Phrases of the same structure in one context teach each other: removing them from the "
    "training data costs 51.1 % of in-context learning, removing random ones 1.5 %."
)
MEASURED = (
    f"One gradient step ({ETA:g}) on each text, and the change of log p of each tested one. A "
    "teacher is the text that helps a recitation most per length of its step; candidates are near "
    "copies of the recitations, of which every 20th, 10th or 5th token is another, and as many "
    "controls. Harm is the change of log p of other recitations after `unlearn` (at the surface) "
    "of one paragraph. "
    "Pieces of 12 prefix tokens, as in the paper, are tested on each token of the continuation: "
    "what helps it could be copied from the context. Learning in context was not measured."
)


def section_influence(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Own influence, teachers named, harm predicted, and pieces of the prefix."""
    rows: list[Row] = []
    no_help, no_prediction = [], []
    for subject in subjects:
        recited, control = subject.drawn(subject.sizes.tested)
        rows += own_influence(subject, recited, control)
        rows += [teachers_named(subject, recited, control, n) for n in subject.sizes.damages]
        help_of_pieces = pieces(subject, recited, control)
        rows += help_of_pieces
        if not all((row.low or 0) > 0 for row in help_of_pieces):
            no_help.append(subject.name)
        if subject.sizes.unlearned:
            harm = harm_predicted(subject, recited)
            rows += harm
            if not (harm[0].low or 0) > 0:
                no_prediction.append(subject.name)
    return {
        "question": "Which text teaches which, and what does forgetting one harm?",
        "paper": "Chen et al. 2024",
        "arxiv": "2402.12530",
        "paper_models": "GPT-2 and OPT",
        "paper_found": PAPER_FOUND,
        "measured": MEASURED,
        "rows": [row._asdict() for row in rows],
        "not_replicated": sentences(
            not_so("Pieces of the prefix help the continuation", no_help),
            not_so("A step of unlearning predicts what `unlearn` harms", no_prediction),
        ),
    }


def own_influence(subject: Subject, recited: mc.Paragraphs, control: mc.Paragraphs) -> list[Row]:
    """How often a text's own log-probability is what a step on it raises most."""
    result = mc.influence(subject.model, recited + control, eta=ETA, progress=False)
    own = result.values.argmax(1) == torch.arange(len(result.trained))
    of = {"recitations": own[: len(recited)], "controls": own[len(recited) :]}
    return [
        mean_row(subject.name, f"own influence is the largest of its row, {name}, share", share)
        for name, share in ((name, values.float()) for name, values in of.items())
    ]


def teachers_named(
    subject: Subject, recited: mc.Paragraphs, control: mc.Paragraphs, damage: int
) -> Row:
    """How often the near copy of a recitation is named as its teacher."""
    n = min(len(recited), len(control))
    ids = recited.ids[:n].clone()
    ids[:, 2::damage] = control.ids[:n, 2::damage]
    copies = recited[:n].with_ids(ids)
    candidates = copies + control[:n]
    result = mc.influence(subject.model, candidates, recited[:n], ETA, progress=False)
    named = torch.tensor((result.teachers()["own_rank"] == 1).tolist()).float()
    what = f"near copy (1 token in {damage} replaced) named of {len(candidates)} candidates, share"
    return mean_row(subject.name, what, named)


def pieces(subject: Subject, recited: mc.Paragraphs, control: mc.Paragraphs) -> list[Row]:
    """What a step on a piece of the prefix does to a token of the continuation, on average."""
    rows = []
    for name, paragraphs in (("recitations", recited), ("controls", control)):
        result = mc.influence(subject.model, paragraphs, eta=ETA, within=True, progress=False)
        means = result.samples["influence"].mean((1, 2)) / ETA
        what = f"change of log p of a continuation token per step on a prefix piece, {name}, nats"
        rows.append(mean_row(subject.name, what, means))
    return rows


def harm_predicted(subject: Subject, recited: mc.Paragraphs) -> list[Row]:
    """Rank correlation of an unlearning step's influence with what unlearning does to others."""
    model, targets = subject.model, recited[: subject.sizes.unlearned]
    before = mc.scan(model, recited, progress=False).log_prob
    after = []
    for target in targets:
        with mc.unlearn(
            model, target, subject.control[:N_GUARDS], depth="surface", progress=False
        ).apply(model):
            after.append(mc.scan(model, recited, progress=False).log_prob)
    harm = torch.stack(after) - before
    step = mc.influence(model, targets, recited, -ETA, progress=False)
    bounds = step.rank_correlation(harm, seed=SEED)
    is_other = torch.arange(len(targets))[:, None] != torch.arange(len(recited))
    others = (harm * is_other).sum(1) / is_other.sum(1)
    what = "rank correlation of a step's influence with the harm of unlearning"
    return [
        Row(subject.name, len(targets), SEED, what, *bounds),
        mean_row(subject.name, "change of log p of other recitations by `unlearn`, nats", others),
    ]
