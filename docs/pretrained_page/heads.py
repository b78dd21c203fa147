"""Part `heads`: which heads and prefix tokens Gemma 3 270M needs for what it recites."""

from __future__ import annotations

import time
from typing import Any

import torch
from pretrained_page.planted import example
from pretrained_page.recited import SEED, STRIDE, windows_of

import memcircuits as mc
from memcircuits.base.statistics import count_groups
from memcircuits.measure.decoding import greedy_continuations

N_RANKED, N_PERTURBED, N_HEADS = 8, 3, 5


def measure() -> dict[str, Any]:
    """A ranking of heads, and the EM lost by replacing prefix tokens."""
    start = time.process_time()
    model = mc.load_model(example().gemma3())
    generator = torch.Generator().manual_seed(SEED)
    control = windows_of(model, "control", STRIDE).sample(N_RANKED, generator)
    ranking = mc.find_memorization_heads(
        model,
        windows_of(model, "known", STRIDE),
        control=control,
        method="screen",
        max_paragraphs=N_RANKED,
        seed=SEED,
        progress=False,
    )
    return {
        "ranking": of_ranking(ranking),
        "perturbation": of_perturbation(model, ranking.memorized, control),
        "seconds": round(time.process_time() - start),
    }


def of_ranking(ranking: mc.Ranking) -> dict[str, Any]:
    """The best heads, and the share of the gradient in lower layers."""
    columns = ["score", "ci_low", "ci_high", "q_value", "em_memorized", "em_control"]
    frame = ranking.to_frame().head(N_HEADS)[columns]
    names = map(str, ranking.top(N_HEADS))
    return {
        "summary": ranking.summary(),
        "notes": list(ranking.notes),
        "verified": int(ranking.evidence["verified"].sum()),
        "heads": [
            {"head": name, **row} for name, row in zip(names, frame.to_dict("records"), strict=True)
        ],
        "layer_share": {name: float(value) for name, value in ranking.layer_share.items()},
    }


def of_perturbation(
    model: Any, memorized: mc.Paragraphs, control: mc.Paragraphs
) -> list[dict[str, Any]]:
    """EM lost by one other prefix token: of recited windows, and of the model's own text."""
    few, others = (
        group.sample(N_PERTURBED, torch.Generator().manual_seed(SEED))
        for group in (memorized, control)
    )
    sets = {
        "recited windows": few,
        "controls, continued by the model": greedy_continuations(model, others, progress=False),
    }
    rows = []
    for name, paragraphs in sets.items():
        perturbed = mc.perturb_prefix(model, paragraphs, seed=SEED, progress=False)
        rows.append(
            {
                "set": name,
                "n": len(paragraphs),
                "groups": count_groups(paragraphs.groups),
                "drop": list(perturbed.mean_em_drop(seed=SEED)),
                "worst": float(perturbed.em_drop.max(1).values.mean()),
            }
        )
    return rows


def text(measured: dict[str, Any]) -> list[str]:
    """The part as Markdown lines."""
    return [
        *_ranking_lines(measured["ranking"]),
        *_perturbation_lines(measured["perturbation"]),
        f"{measured['seconds']} processor seconds for this part, loading included.",
        "",
    ]


def _ranking_lines(ranking: dict[str, Any]) -> list[str]:
    share = {name: f"{100 * value:.0f} %" for name, value in ranking["layer_share"].items()}
    return [
        "## Which heads it depends on",
        "",
        "`find_memorization_heads` on windows of the nine passages, with windows of the other text "
        f'as controls (`method="screen"`, seed {SEED}): {ranking["summary"]} '
        f"{ranking['verified']} heads were ablated exactly.",
        "",
        "| head | score, nats/token | 95 % interval | q | tokens lost, recited | tokens lost, "
        "control |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['head']} | {row['score']:.3f} | {row['ci_low']:.3f} to {row['ci_high']:.3f} "
            f"| {row['q_value']:.3f} | {_lost(row['em_memorized'])} | {_lost(row['em_control'])} |"
            for row in ranking["heads"]
        ),
        "",
        "The loss of a recited text is low and can rise far, so many heads of the model are "
        "significant: their order and the tokens lost say more (see [limits](limits.md)).",
        "",
        f"Share of the gradient in the lower half of the layers: {share['memorized']} for recited "
        f"windows, {share['control']} for controls.",
        "",
        *(f"- {note}" for note in ranking["notes"]),
        "",
    ]


def _lost(change: float) -> str:
    return f"{abs(round(change, 1)):.1f}" if change <= 0 else f"{-change:.1f}"


def _perturbation_lines(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## One other token in the prefix",
        "",
        "Every prefix token is replaced by a random one, one at a time (one draw). The controls "
        "are measured against what the model itself writes after them, as in the paper.",
        "",
        "| text | n | groups | mean EM drop of 12, tokens | 95 % interval | drop at the worst "
        "place |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['set']} | {row['n']} | {row['groups']} | {row['drop'][0]:.2f} "
            f"| {row['drop'][1]:.2f} to {row['drop'][2]:.2f} | {row['worst']:.2f} |"
            for row in rows
        ),
        "",
    ]
