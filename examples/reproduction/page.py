"""The page and the JSON of all findings."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd

import memcircuits as mc
from memcircuits import pages
from memcircuits.results.provenance import versions
from reproduction.contents import contents
from reproduction.statistics import FEWEST
from reproduction.study import PAPER, Study, is_papers


def plain(value: Any) -> Any:
    """NaN becomes null: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def table(done: Sequence[dict[str, Any]], command: str, seed: int) -> list[dict[str, Any]]:
    """One row per number."""
    return [
        {
            "experiment": part["title"],
            "source": part["source"],
            **finding,
            "seed": seed,
            "command": f"{command} --only {part['name']}",
        }
        for part in done
        for finding in part["findings"]
    ]


def page(
    study: Study, done: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> pages.Page:
    """The page: what was run, one table per experiment, its charts, what could not be had."""
    name, missing = study.adapter.label, [row for row in rows if row["ours"] is None]
    blocks: list[pages.Block] = [
        pages.Prose([told(study)], title="How to read it"),
        pages.Table(pd.DataFrame(contents(done)), title="Contents"),
    ]
    for part in done:
        frame = pd.DataFrame(part["findings"])
        frame["95 %"] = [span(row) for row in part["findings"]]
        frame["ours"] = [shown(row["ours"]) for row in part["findings"]]
        frame = frame[["measure", "paper", "ours", "95 %", "units", "n", "note"]]
        blocks.append(
            pages.Table(
                frame.loc[:, (frame != "").any()],
                title=part["title"],
                note=f"In the paper: {part['source']}. {part['seconds']:.0f} s."
                if part["source"] != "not in the paper"
                else f"Not in the paper. {part['seconds']:.0f} s.",
            )
        )
        blocks += [block(kind, settings) for kind, settings in part["charts"]]
    if missing:
        frame = pd.DataFrame(missing)[["experiment", "measure", "paper", "note"]]
        blocks.append(pages.Table(frame, title="What could not be had, and why"))
    facts = {
        "model": name,
        "weights": study.adapter.fingerprint(),
        **{k: f"{len(v)} paragraphs, {v.hash}" for k, v in groups(study).items()},
        "basis": study.adapter.basis,
        "seed": study.seed,
        **versions(),
    }
    command = rows[0]["command"].rpartition(" --only ")[0]
    blocks.append(pages.Facts(facts, commands=[command], title="What was run"))
    return pages.Page(
        title=f"Localizing paragraph memorization, on {name}",
        lead="The experiments of Stoehr et al. 2024 (arXiv 2403.19851): the paper's numbers, which "
        "are GPT-Neo 125M's, beside those measured here.",
        blocks=blocks,
        footer="Made by memcircuits.",
    )


def groups(study: Study) -> dict[str, mc.Paragraphs]:
    sets = {
        "paragraphs given": study.given,
        "controls given": study.controls,
        "perturbed given": study.perturbed_given,
    }
    return {name: group for name, group in sets.items() if group is not None}


def told(study: Study) -> list[Any]:
    same, basis = is_papers(study), study.adapter.basis
    return [
        f"All numbers are in the {basis} basis unless their row says otherwise; the paper's code "
        "folds norms into the weights, which changes gradients and not the function. Intervals are "
        "95 %, from resampling paragraphs, or from leaving out a fifth of them at a time where a "
        f"number is no mean; fewer than {FEWEST} paragraphs have none. An empty cell in the "
        "paper's column: it shows a figure without a number. ",
        pages.strong(
            "This is the paper's model. Rows may still differ from the paper: other paragraphs "
            "are drawn, and edits are measured on held-out controls."
            if same
            else "This is not the paper's model: its numbers need GPT-Neo 125M's weights and "
            "paragraphs, and stand here to say what is measured."
        ),
        " ",
        pages.link("The paper", PAPER),
    ]


def block(kind: str, settings: dict[str, Any]) -> pages.Block:
    settings = dict(settings)
    if "frame" in settings:
        settings["frame"] = pd.DataFrame(settings["frame"])
    if kind == "Heatmap":
        settings["values"] = [
            [math.nan if value is None else value for value in row] for row in settings["values"]
        ]
    if kind == "Tokens":
        settings["strip"] = pages.Strip(settings.pop("values"))
    if "marks" in settings:
        settings["marks"] = [tuple(mark) for mark in settings["marks"]]
    result: pages.Block = getattr(pages, kind)(**settings)
    return result


def shown(value: Any) -> str:
    if value is None:
        return "not had"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def span(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
