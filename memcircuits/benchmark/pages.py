"""The leaderboard as files: Markdown for the documentation, an HTML page, a table and a figure.

Both texts consist of the same notes (what was run, and results that fit no table) and the same
tables. The Markdown is the template `templates/leaderboard.md.j2`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from memcircuits.base.io import write_atomically
from memcircuits.benchmark.leaderboard import (
    combinations,
    decoys_named,
    deletions,
    given_away,
    holders_accuracy,
    leaderboard,
    leaderboard_figure,
)
from memcircuits.benchmark.metrics import METRICS, wilson
from memcircuits.benchmark.schemas import Run, Trials
from memcircuits.benchmark.trial_kinds import N_CONTROLS, PLANTED_KINDS, TRIAL_KINDS
from memcircuits.benchmark.trials import read_run

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Page

DECOYS = {"damaged": "the damaged head", "holder": "the head that holds the controls"}
"""Headings of the columns of `decoys_named`."""

_TEMPLATES = Path(__file__).parent / "templates"


def write_leaderboard(trials: Trials, folder: str | Path) -> list[Path]:
    """Write `leaderboard.parquet`, `.md` and `.html`, and the figure of single heads.

    Args:
        trials: see `read_trials`.
        folder: the trials' folder, which also says what was run.

    Returns:
        The files written.
    """
    folder = Path(folder)
    run = read_run(folder)
    frame = leaderboard(trials)
    notes, tables = _notes(trials, run, frame), _tables(trials, frame)
    parquet = io.BytesIO()
    frame.to_parquet(parquet, index=False)
    written = [
        write_atomically(folder / "leaderboard.parquet", parquet.getvalue()),
        write_atomically(folder / "leaderboard.md", _markdown(notes, tables)),
        _page(notes, tables).save(folder / "leaderboard.html"),
    ]
    if "head" in set(frame["kind"]):
        figure = leaderboard_figure(frame).to_html(include_plotlyjs=True)
        written.append(write_atomically(folder / "leaderboard-figure.html", figure))
    return written


def _markdown(notes: Sequence[str], tables: Mapping[str, pd.DataFrame]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    template = environment.get_template("leaderboard.md.j2")
    return template.render(notes=notes, tables=tables)


def _page(notes: Sequence[str], tables: Mapping[str, pd.DataFrame]) -> Page:
    from memcircuits.display.pages import Page, Prose, Table

    return Page(
        "Who finds what was planted?",
        [
            Prose(notes, title="What was run"),
            *(Table(table, title=title) for title, table in tables.items()),
        ],
        lead="Paragraphs were written into known weights; every method was asked where they are. "
        "Means over places with 95 % intervals.",
    )


def _notes(trials: Trials, run: Run, frame: pd.DataFrame) -> list[str]:
    """What was run, and the results that fit into no table."""
    seconds = sum(trial.seconds for kind in TRIAL_KINDS for trial in trials.get(kind, []))
    return [
        f"{run.model.name} (weights {run.model.fingerprint}), {run.options.n} paragraph(s) written "
        f"in each trial, {N_CONTROLS} controls, seed {run.options.seed}; {seconds / 60:.0f} "
        "minutes of trials in all.",
        *_notes_on_failures(trials),
        *_notes_on_giveaways(frame),
        *_notes_on_null(trials),
        *_notes_on_holders(trials),
    ]


def _notes_on_failures(trials: Trials) -> Iterator[str]:
    for kind in PLANTED_KINDS:
        of_kind = trials.get(kind, [])
        failed = [trial for trial in of_kind if trial.failed]
        if failed:
            places = ", ".join(" + ".join(trial.where) for trial in failed)
            yield (
                f"{kind}: {len(failed)} of {len(of_kind)} places could not hold the text and were "
                f"left out ({places})."
            )


def _notes_on_giveaways(frame: pd.DataFrame) -> Iterator[str]:
    for kind, name in given_away(frame).items():
        row = frame[(frame["kind"] == kind) & (frame["localizer"] == name)].iloc[0]
        yield (
            f"{kind}: these trials are void, because {name}, which reads no text, ranks a planted "
            f"unit first in {_with_interval(row, 'recall_at_1')} of the places."
        )


def _notes_on_null(trials: Trials) -> Iterator[str]:
    for trial in trials.get("null", []):
        for name, result in trial.pairs.items():
            low, high = wilson(result.named / trial.runs, trial.runs)
            n, losses = result.per_side, " and ".join(f"{nll:.2f}" for nll in result.nll)
            yield (
                f"No memory to find, {name} ({n} against {n} drawn anew in each run, mean loss "
                f"{losses} nats/token): a head was called significant in {result.named} of "
                f"{trial.runs} runs ({100 * low:.1f} to {100 * high:.1f} % of draws from these "
                "paragraphs)."
            )


def _notes_on_holders(trials: Trials) -> Iterator[str]:
    n_planted = sum(trial.planted for trial in trials.get("holders", []))
    for row in holders_accuracy(trials).to_dict("records"):
        interval = ""
        if row["trials"] > 1:
            low, high = 100 * row["first_low"], 100 * row["first_high"]
            interval = f" ({low:.0f} to {high:.0f} % over {row['trials']} models)"
        yield (
            f"Who holds what, six paragraphs in six heads of one model ({row['method']}): the "
            f"right head is first of all for {100 * row['first']:.0f} % of the {row['paragraphs']} "
            f"paragraphs that are recited when all of the {n_planted} are written{interval}, first "
            f"of the six for {100 * row['among_holders']:.0f} % (chance 17 %), and the head of "
            f"another paragraph is first of all for {100 * row['decoy']:.0f} %."
        )


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    """A mean with its interval, or by itself if there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{row[name]:.2f}{interval}"


def _tables(trials: Trials, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> a frame of text and rounded numbers."""
    import pandas as pd

    tables: dict[str, pd.DataFrame] = {}
    void = given_away(frame)
    for kind, of_kind in frame.groupby("kind", sort=False):
        table = pd.DataFrame({"localizer": of_kind["localizer"]})
        for metric in METRICS:
            table[metric.replace("_at_", "@").replace("_", " ")] = [
                _with_interval(row, metric) for row in of_kind.to_dict("records")
            ]
        table["forward passes"] = of_kind["forwards"].round().astype(int)
        n_trials, n_places = of_kind[["trials", "places"]].iloc[0]
        mark = ", void" if kind in void else ""
        tables[f"Written: {kind} ({n_trials} trials, {n_places} places{mark})"] = table
    deleted = deletions(trials)
    if len(deleted):
        title = f"Silencing the head that it names (DEL, {deleted['trials'].iloc[0]} trials)"
        table = deleted[["localizer", "targets", "others"]].round(2)
        table["others - targets"] = [
            _with_interval(row, "difference") for row in deleted.to_dict("records")
        ]
        tables[title] = table
    decoys = decoys_named(trials)
    if len(decoys):
        title = f"Decoys that are ranked first ({decoys['trials'].iloc[0]} trials)"
        table = pd.DataFrame({"localizer": decoys["localizer"]})
        for column, heading in DECOYS.items():
            table[heading] = [_with_interval(row, column) for row in decoys.to_dict("records")]
        tables[title] = table
    combined = combinations(trials)
    if len(combined):
        title = "Evidence added up (chosen on even trials, measured on odd ones)"
        tables[title] = combined.round(3)
    for trial in trials.get("stability", []):
        if trial.agreement:
            rows = [
                {"localizer": name, "halves": round(tau.halves, 2), "seeds": round(tau.seeds, 2)}
                for name, tau in trial.agreement.items()
            ]
            table = pd.DataFrame(rows).sort_values("halves", ascending=False, ignore_index=True)
            tables["Agreement of rankings, Kendall's tau (nothing planted)"] = table
    return tables
