"""TODO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcircuits.benchmark.kinds import METRICS, N_CONTROLS, UNIT
from memcircuits.benchmark.leaderboard import (
    combinations,
    deletion_areas,
    holders_accuracy,
    leaderboard,
    leaderboard_figure,
)
from memcircuits.benchmark.metrics import wilson
from memcircuits.core.io import write_atomically

if TYPE_CHECKING:
    import pandas as pd


def write_leaderboard(
    trials: Mapping[str, Sequence[Mapping[str, Any]]], folder: str | Path
) -> list[Path]:
    """Write `leaderboard.parquet`, `.md` and `.html`, and the figure of single heads."""
    import io

    frame = leaderboard(trials)
    raw = io.BytesIO()
    frame.to_parquet(raw, index=False)
    folder = Path(folder)
    written = [
        write_atomically(folder / "leaderboard.parquet", raw.getvalue()),
        write_atomically(folder / "leaderboard.md", to_markdown(trials, _run_of(folder))),
        _page(trials, _run_of(folder)).save(folder / "leaderboard.html"),
    ]
    if "head" in set(frame["kind"]):
        figure = leaderboard_figure(frame).to_html(include_plotlyjs=True)
        written.append(write_atomically(folder / "leaderboard-figure.html", figure))
    return written


def _run_of(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def _notes(trials: Mapping[str, Sequence[Mapping[str, Any]]], run: Mapping[str, Any]) -> list[str]:
    """What was run, and what does not fit into the table."""
    model, options = run["model"], run["options"]
    seconds = sum(trial["seconds"] for mine in trials.values() for trial in mine)
    notes = [
        f"{model['name']} (weights {model['fingerprint']}), {options['n']} paragraph(s) written in "
        f"each trial, {N_CONTROLS} controls, seed {options['seed']}; {seconds / 60:.0f} minutes of "
        "trials in all."
    ]
    for kind in UNIT:
        mine = trials.get(kind, ())
        failed = [trial for trial in mine if trial["failed"]]
        if failed:
            places = ", ".join(" + ".join(trial["where"]) for trial in failed)
            notes.append(
                f"{kind}: {len(failed)} of {len(mine)} places could not hold the text and were "
                f"left out ({places})."
            )
    for trial in trials.get("null", ()):
        for name in ("unknown", "recited"):
            if name in trial:
                found = trial[name]
                low, high = wilson(found["named"], trial["runs"])
                notes.append(
                    f"No difference to find ({name} paragraphs, {found['per_side']} against "
                    f"{found['per_side']}, labels shuffled): a head was called significant in "
                    f"{found['named']} of {trial['runs']} runs ({100 * low:.1f} to "
                    f"{100 * high:.1f} %)."
                )
    written = sum(trial["planted"] for trial in trials.get("holders", ()))
    for _, row in holders_accuracy(trials).iterrows():
        low, high = wilson(round(row["first"] * row["paragraphs"]), int(row["paragraphs"]))
        notes.append(
            f"Who holds what, six paragraphs in six heads of one model ({row['method']}): the "
            f"right head is first of all for {100 * row['first']:.0f} % of the {row['paragraphs']} "
            f"paragraphs that are still recited when all of the {written} are written "
            f"({100 * low:.0f} to {100 * high:.0f} %), first of the six for "
            f"{100 * row['among_holders']:.0f} % (chance 17 %)."
        )
    return notes


def _tables(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, pd.DataFrame]:
    """Tables as they are shown: a title and a frame of text and numbers."""
    import pandas as pd

    frame = leaderboard(trials)
    found: dict[str, pd.DataFrame] = {}
    for kind, mine in frame.groupby("kind", sort=False):
        table = pd.DataFrame({"localizer": mine["localizer"]})
        for metric in METRICS:
            table[metric.replace("_at_", "@").replace("_", " ")] = [
                f"{row[metric]:.2f} [{row[f'{metric}_low']:.2f}, {row[f'{metric}_high']:.2f}]"
                for _, row in mine.iterrows()
            ]
        table["forward passes"] = mine["forwards"].round().astype(int)
        found[f"Written: {kind} ({mine['trials'].iloc[0]} trials)"] = table
    deleted = deletion_areas(trials) if trials.get("head") else pd.DataFrame()
    if len(deleted):
        shown = deleted.drop(columns=["trials"]).round(2)
        found[f"Silencing what it names (DEL, {deleted['trials'].iloc[0]} trials)"] = shown
    combined = combinations(trials)
    if len(combined):
        found["Evidence added up (chosen on even trials, measured on odd ones)"] = combined.round(3)
    for trial in trials.get("stability", ()):
        rows = [
            {"localizer": n, **{k: round(v, 2) for k, v in a.items()}}
            for n, a in trial["agreement"].items()
        ]
        if rows:
            table = pd.DataFrame(rows).sort_values("halves", ascending=False, ignore_index=True)
            found["Agreement of rankings, Kendall's tau (nothing planted)"] = table
    return found


def to_markdown(trials: Mapping[str, Sequence[Mapping[str, Any]]], run: Mapping[str, Any]) -> str:
    """The leaderboard as Markdown, for docs."""
    lines = [f"- {note}" for note in _notes(trials, run)]
    for title, table in _tables(trials).items():
        lines += ["", f"**{title}**", "", "| " + " | ".join(map(str, table.columns)) + " |"]
        lines.append("| " + " | ".join("---" for _ in table.columns) + " |")
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def _page(trials: Mapping[str, Sequence[Mapping[str, Any]]], run: Mapping[str, Any]) -> Any:
    from memcircuits.display.pages import Page, Prose, Table

    return Page(
        "Who finds what was planted?",
        [
            Prose(_notes(trials, run), title="What was run"),
            *(Table(table, title=title) for title, table in _tables(trials).items()),
        ],
        lead="Paragraphs were written into known weights; every method was asked where they are. "
        "Means over trials with 95 % intervals.",
    )
