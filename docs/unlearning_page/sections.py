"""The sections of docs/unlearning.md from kept runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from unlearning_page import audits
from unlearning_page.further import noise_section, relearning, share_section
from unlearning_page.numbers import HEAD, NEEDS, change, interval, mean, read, row, table
from unlearning_page.plot import plot
from unlearning_page.runs import jobs
from unlearning_page.setting import (
    ABLATION,
    ARMS,
    AS_MANY,
    ATTACKS,
    DEVELOPMENT,
    FRONT,
    HELDOUT,
    RATES,
    SEED,
    TABLE,
    UNSEEN,
    VARIANTS,
    Runs,
)


def write(runs: Runs, page: Path) -> None:
    """Sections whose runs are not all there stay as they are."""
    names = [name for chain in jobs() for name, _ in chain]
    kept = [
        title
        for title, pattern in NEEDS.items()
        if not all(name in runs for name in names if re.match(pattern, name))
    ]
    new, plotted = sections(runs)
    if kept:
        old = dict(split(page.read_text(encoding="utf-8")))
        new |= {title: old[title] for title in kept}
        new[""] += (
            "\nSections of an earlier run of the same command, whose single numbers were not kept: "
            + ", ".join(f"*{title}*" for title in kept)
            + ".\n"
        )
    if "The front" not in kept:
        page.with_name("unlearning.svg").write_text(plotted, encoding="utf-8")
    audited = page.with_name(audits.NAME)
    if audited.exists():
        new[audits.TITLE] = audits.section(json.loads(audited.read_text(encoding="utf-8")))
    elif page.exists():
        new |= {t: body for t, body in split(page.read_text("utf-8")) if t == audits.TITLE}
    titles = [title for title in (audits.TITLE, *NEEDS) if title in new]
    text = new[""] + "".join(f"\n## {title}\n{new[title]}" for title in titles)
    page.write_text(text.rstrip() + "\n", encoding="utf-8")


def split(text: str) -> list[tuple[str, str]]:
    """Titles and texts of sections; the first has none."""
    first, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    parts = [part.partition("\n") for part in rest]
    return [("", first.rstrip() + "\n"), *((t, body.rstrip() + "\n") for t, _, body in parts)]


def sections(runs: Runs) -> tuple[dict[str, str], str]:
    """The page's sections by title, and the figure."""
    assert len({run["fingerprint"] for run in runs.values()}) == 1, "runs of different weights"
    before = runs["before"]
    natural = read(runs, "natural")
    n = len(natural)
    nothing = [
        "no-op",
        str(len(before["em"])),
        f"{sum(before['em']) / len(before['em']):.1f}",
        "0",
        f"{before['own']:.1f}",
        "0",
    ]
    arms = [nothing]
    for arm, rate in TABLE.items():
        mine = read(runs, f"{arm}-{rate:g}")
        if mine:
            arms.append(row(f"{ARMS[arm]}, reference, lr {rate:g}", mine, before))
    arms.append(row("**top 0.1 %, ours**", natural, before))
    front, points = [], {}
    for arm, rates in RATES.items():
        for rate in rates:
            mine = read(runs, f"{arm}-{rate:g}")[:FRONT]
            if mine:
                front.append(row(f"{ARMS[arm]}, lr {rate:g}", mine, before))
                points.setdefault(ARMS[arm], []).append(mine)
    front.append(row("**ours**", natural[:FRONT], before))
    points["ours"] = [natural[:FRONT]]
    ablations = []
    for name, (label, _) in VARIANTS.items():
        mine = read(runs, name)[:ABLATION]
        if mine:
            loose = interval((mean([r], "loose") for r in mine), 2)
            stopped = sum(r["stopped"] == "em" for r in mine)
            ablations.append([*row(label, mine, before), loose, f"{stopped}/{len(mine)}"])
    measures = [
        [
            label,
            *(
                interval((mean([r], key) for r in mine), 2 if key != "bits" else 1)
                for key in ("em", "nll", "bits", "loose", "extraction", "attacked")
            ),
            interval((r["kl"] for r in mine), 5),
        ]
        for label, mine in (
            ("ours", natural),
            ("ours, all tokens within the budget", read(runs, "all-tokens")),
            ("reference, all weights, lr 0.0001", read(runs, "all-0.0001")),
            ("reference, top 0.1 %", read(runs, f"top-{TABLE['top']:g}")),
        )
        if mine
    ]
    keys = ("em", "nll", "bits", "loose", "extraction", "attacked")
    measures.insert(0, ["before", *(f"{mean([before], k):.2f}" for k in keys), "0"])
    rows_together = [["no-op", "0", f"0 of {len(before['em'])}", "50.0", "0", "50.0", "0"]]
    for key in sorted(key for key in runs if key.startswith("together/")):
        run, name = runs[key], key.removeprefix("together/")
        arm, _, rate = re.sub(r"-(?=[\d.e-]+$)", " ", name, count=1).partition(" ")
        label = f"{(ARMS | {'many': f'top {100 * AS_MANY:g} %'}).get(arm)}, reference, lr {rate}"
        if arm in ("natural", "at-once"):
            way = "one by one" if arm == "natural" else "all at once"
            label = f"**ours, {way}**" if arm == "natural" else f"ours, {way}"
        forgotten = sum(e < 5 for e in run["em"])
        rows_together.append(
            [
                label,
                f"{100 * run['masked'] / run['candidates']:.1f}",
                f"{forgotten} of {len(run['em'])}",
                interval(run["em"], 1),
                f"{run['kl']:.5f}",
                f"{run['own']:.1f}",
                f"{change(run, before):.2f}",
            ]
        )
    small = [r for r in natural if mean([r], "em") < 5]
    verdict = table(
        ["at memorized EM < 5", "target", "ours"],
        [
            ["paragraphs that get there", "all", f"{len(small)} of {n}"],
            ["KL of unseen controls", "at most 0.002", interval((r["kl"] for r in small), 5)],
            [
                "perplexity of held-out text",
                "at most +0.5 %",
                interval((change(r, before) for r in small), 2) + " %",
            ],
            ["unseen controls' own EM", "", interval((r["own"] for r in small), 1)],
        ],
    )
    paired = table(
        ["reference recipe", "brings below 5", "its controls' own EM", "ours there", "times"],
        reference_at_low_em(runs, natural),
    )
    text = f"""# Unlearning on the organism

Written by `python docs/make_unlearning.py`. Model: the shipped organism, weights
`{before["fingerprint"]}`, {before["versions"]}, float32, CPU.

The 88 paragraphs recited in full were shuffled with seed {SEED}: recipe and settings were chosen on
the first {DEVELOPMENT}, and the numbers here are from the other {88 - DEVELOPMENT} only. n says how
many of these each line is from. Every line edits one paragraph at a time (unless it says
otherwise), restoring the model between. {UNSEEN} controls that no edit was given measure what else
is lost: their *own* greedy continuations (50 tokens recited before any edit, by definition), the KL
along these, and the perplexity of {HELDOUT} held-out rows. Ours sees 64 other controls and takes 16
for its budget; the reference recipe sees 11 others, 10 in each of its 10 steps of Adam, as the
paper does. Brackets are 95 % bootstrap intervals over the edited paragraphs (2,000 draws, seed
{SEED}); the controls are the same for all lines and are not resampled.

## The five arms

{table(HEAD, arms)}

{verdict}

The controls' own EM at the same memorized EM: for each paragraph that the reference recipe brings
below 5 at any of the rates of the front, that rate of them which leaves the controls most, beside
ours on the same paragraphs. The target is twice as much.

{paired}

## The front

The reference recipe at several learning rates, on the first {FRONT} paragraphs.

![Memorized EM against KL and against the controls' own EM](unlearning.svg)

{table(HEAD, front)}

## What each part of the recipe does

The default and its relatives on the first {ABLATION} paragraphs, each until the paragraph is
forgotten (EM < 5) or 50 steps are over, without a budget. *Still greedy*: share of the
continuation's tokens that are the greedy choice after the true tokens before them. The objective
matters most: an edit that mostly blocks the first tokens is the cheapest. The value of the
curvature shows within one objective.

{table([*HEAD, "still greedy", "forgotten"], ablations)}

## How deep does it go?

EM counts up to the first wrong token. *Extraction* is the probability that one of 1,000 samples is
the whole continuation; *attacked* the largest EM over the prefix itself and {ATTACKS} perturbations
of it, one to three random tokens replaced in each. The recipe stops at the first wrong token, and
most of the others are still known: to push every token off the greedy path within the same budget
take `dataclasses.replace(NATURAL_GRADIENT, objective="margin")` and `em_below=0` (second line, n =
{len(read(runs, "all-tokens"))}).

{
        table(
            [
                "edit",
                "EM",
                "NLL (nats/token)",
                "bits",
                "still greedy",
                "extraction",
                "attacked EM",
                "unseen KL",
            ],
            measures,
        )
    }

{besides_section(runs)}
## All paragraphs in one edit

Ours takes them one by one: each has its own 0.1 % of the weights, chosen and changed at the weights
that the earlier paragraphs changed. *All at once*: one mask and the sum of the objectives, in
steps of `step_kl=3e-4`; a budget of 0.05 nats/token on the edit's own held-out controls ends both.

{table([HEAD[0], "weights (%)", "below 5", *HEAD[2:]], rows_together)}

{relearning(runs)}
{noise_section(runs)}
{share_section(runs)}
"""
    return dict(split(text)), plot(points)


def besides_section(runs: Runs) -> str:
    labels = {
        "natural": "**ours**",
        "guarded": f"ours, {DEVELOPMENT} further recitations among its controls",
        "all": "all weights, reference, lr 0.0001",
        "top": "top 0.1 %, reference, lr 0.003",
    }
    rows = []
    for name, label in labels.items():
        mine = read(runs, f"besides/{name}")
        if mine:
            left = [sum(em == 50 for em in run["others"]) for run in mine]
            rows.append(
                [
                    label,
                    str(len(mine)),
                    interval((mean([r], "em") for r in mine), 1),
                    interval(left, 1),
                    interval((mean([r], "others") for r in mine), 1),
                    interval((r["kl"] for r in mine), 5),
                ]
            )
    if not rows:
        return ""
    head = ["edit", "n", "memorized EM", "others in full", "others' EM", "unseen KL (nats/token)"]
    others = 87 - DEVELOPMENT
    return (
        "## What happens to other recitations\n\nControls are texts that the model does not "
        "recite. An edit of one paragraph may stop other\nrecitations too. The table counts how "
        f"many of the {others} other paragraphs reported on here, all recited\nin full before the "
        "edit, are recited in full after it. None of them was a control of the edit.\n\n"
        + table(head, rows)
        + "\n"
    )


def reference_at_low_em(runs: Runs, natural: list[dict[str, Any]]) -> list[list[str]]:
    """Each arm at its best rate for each paragraph that it forgets, and ours on the same ones."""
    rows = []
    for arm, rates in RATES.items():
        result = [read(runs, f"{arm}-{rate:g}") for rate in rates]
        best = {}
        for i, mine in enumerate(zip(*result, strict=False)):
            forgetting = [run["own"] for run in mine if mean([run], "em") < 5]
            if forgetting and mean([natural[i]], "em") < 5:
                best[i] = max(forgetting)
        theirs, ours = sum(best.values()), sum(natural[i]["own"] for i in best)
        rows.append(
            [
                ARMS[arm],
                f"{len(best)} of {len(result[0])}",
                interval(best.values(), 1) if best else "",
                interval((natural[i]["own"] for i in best), 1) if best else "",
                f"{ours / theirs:.2f}" if best else "",
            ]
        )
    return rows
