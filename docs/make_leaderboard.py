"""Write docs/leaderboard.md, its picture and README's table from finished trials.

memcircuits bench localize --seed 1000 --out bench
python docs/make_leaderboard.py bench

If the trials are only of some kinds (`--kinds decoys`), they take the place of those kinds in the
numbers and on the page, which keep the others.

Methods were chosen while trials of lower seeds were looked at, so those are not reported. The row
on trained memory is of docs/twin.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from memcircuits.base.io import write_atomically
from memcircuits.benchmark.leaderboard import (
    decoys_named,
    given_away,
    holders_accuracy,
    leaderboard,
    leaderboard_figure,
)
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.trial_kinds import (
    COMPONENT_RANKING,
    RANKINGS,
    TEXT_BLIND,
    UNIT_OF_KIND,
)
from memcircuits.benchmark.trials import read_run, read_trials

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
NUMBERS, HOLDERS, NULL, DECOYS, TWIN = (
    DOCS / f"{name}.json"
    for name in (
        "leaderboard",
        "leaderboard-holders",
        "leaderboard-null",
        "leaderboard-decoys",
        "twin",
    )
)
UNSEEN = 1000  # trials of lower seeds were looked at while methods were chosen
START, STOP = "<!-- localization: memcircuits bench localize -->", "<!-- /localization -->"
HEAD = """# Leaderboard of localizers

Written by `memcircuits bench localize` and `python docs/make_leaderboard.py`. What the words mean:
[choosing evidence](evidence.md).

![Recall@1 of every localizer where norms are kept](pictures/leaderboard.png)

"""
KINDS = {
    "head": "one head",
    "head-same-norm": "one head, norms kept",
    "two-heads": "two heads",
    "decoys": "one head, beside two decoys",
    "head-and-mlp": "a head and an MLP together",
    "values": "the values of one head (5 tokens)",
    "block": "the attention or the MLP of a layer",
    "neurons": "1 % of the neurons",
    "neuron-outputs": "what 1 % of the neurons write",
}
OURS = {
    "head": RANKINGS[0],
    "block": "zero-ablation",
    "component": COMPONENT_RANKING,
    "neuron": "log-odds-attribution",
}
"""What ranks these units in the package: of blocks `find_memorization_components`, which ablates
neurons that log-odds attribution puts first."""
NO_RIVALS = {*RANKINGS, COMPONENT_RANKING, *TEXT_BLIND, "oracle", "random"}


def short_table(frame: pd.DataFrame, holders: pd.DataFrame, natural: pd.DataFrame) -> str:
    """README's table: every kind of place, ours beside the best rival and text-blind methods."""
    void = given_away(frame)
    lines = [
        "| memory in | measure | n | ours | best of the rivals | a method that reads no text |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, place in sorted(KINDS.items(), key=lambda item: item[0] in void):
        of_kind = frame[frame["kind"] == kind].set_index("localizer")
        ours = OURS[UNIT_OF_KIND[kind]]
        rivals = of_kind.drop(index=[*NO_RIVALS, ours], errors="ignore")
        blind = of_kind.loc[of_kind.index.isin(TEXT_BLIND), "recall_at_k"]
        best = rivals.sort_values(["recall_at_k", "auc"]).iloc[-1]
        lines.append(
            f"| {place}{' (void)' if kind in void else ''} | recall@k | "
            f"{of_kind['trials'].iloc[0]} | {_cell(of_kind.loc[ours], 'recall_at_k')} | "
            f"{best.name} {_cell(best, 'recall_at_k')} | {blind.max():.2f} |"
        )
    exact = holders.set_index("method").loc["exact"]
    n = f"{exact['paragraphs']:.0f} paragraphs, {exact['trials']:.0f} models"
    place = "six heads, a paragraph each"
    lines += [
        f"| {place} | own head first | {n} | {_cell(exact, 'first')} | | |",
        f"| {place} | another's head first | {n} | {_cell(exact, 'decoy')} | | |",
    ]
    ours = natural.loc[RANKINGS[0]]
    rivals = natural[~natural["reference"].astype(bool)].drop(index=[*NO_RIVALS], errors="ignore")
    best = rivals.sort_values("correlation").iloc[-1]
    lines.append(
        f"| what training wrote (heads) | rank correlation | 1 model, {int(ours['n'])} paragraphs "
        f"| {_cell(ours, 'correlation')} | {best.name} {_cell(best, 'correlation')} | |"
    )
    return "\n".join(lines)


def _cell(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = "" if pd.isna(low) else f" ({low:.2f} to {high:.2f})"
    return f"{row[name]:.2f}{interval}"


def natural_rows() -> pd.DataFrame:
    """Agreement of the localizers with what reverting each head to the twin costs."""
    numbers: dict[str, Any] = json.loads(TWIN.read_text(encoding="utf-8"))
    rows = pd.DataFrame(numbers["natural"])
    rows = rows[(rows["direction"] == "model") & (rows["truth"] == "necessity")]
    n = numbers["transplants"]["model, weights"]["n"]
    return rows.set_index("localizer").assign(n=n)


def in_readme(text: str, table: str) -> str:
    """README with the table between its marks."""
    before, _, rest = text.partition(START)
    _, mark, after = rest.partition(STOP)
    return f"{before}{START}\n{table}\n{STOP}{after}" if mark else text


def kept_table() -> str:
    """README's table from the numbers in docs."""
    frame, holders = (pd.read_json(path, orient="records") for path in (NUMBERS, HOLDERS))
    return short_table(frame, holders, natural_rows())


def with_kept(page: str, kept: str) -> str:
    """The kept page, with the notes and the tables of a page of further kinds of trial."""

    def parts(text: str) -> tuple[str, dict[str, str]]:
        notes, *tables = re.split(r"^(?=\*\*)", text, flags=re.MULTILINE)
        # The number of trials stands behind the words of a title.
        return notes.rstrip("\n"), {re.split(r" \(|\*\*$", t, maxsplit=1)[0]: t for t in tables}

    (notes, tables), (more_notes, more_tables) = parts(kept), parts(page)
    again = tuple(f"- {title.split()[-1]}: " for title in more_tables if "Written" in title)
    of_others = [line for line in notes.splitlines() if not line.startswith(again)]
    new = [line for line in more_notes.splitlines() if line not in of_others]
    # What adds up the evidence of several localizers is about single heads.
    chosen = {title: t for title, t in more_tables.items() if "Evidence added up" not in title}
    return "\n".join([*of_others, *new, "", *(tables | chosen).values()])


def main(folder: str) -> None:
    if read_run(folder).options.seed < UNSEEN:
        sys.exit(
            f"seed: methods were chosen on trials of these seeds; run them with {UNSEEN} or more"
        )
    trials = read_trials(folder)
    write_leaderboard(trials, folder)
    frame, page = leaderboard(trials), (Path(folder) / "leaderboard.md").read_text("utf-8")
    path = DOCS / "leaderboard.md"
    if "head" in trials:
        page = HEAD + page
        write_atomically(HOLDERS, _records(holders_accuracy(trials)))
        write_atomically(NULL, trials["null"][0].model_dump_json(indent=1) + "\n")
        figure = leaderboard_figure(frame, "head-same-norm")
        figure.write_image(DOCS / "pictures" / "leaderboard.png")
    else:
        page = with_kept(page, path.read_text("utf-8"))
        kept = pd.read_json(NUMBERS, orient="records")
        frame = pd.concat([kept[~kept["kind"].isin(frame["kind"])], frame])
    write_atomically(path, page)
    write_atomically(NUMBERS, _records(frame))
    if "decoys" in trials:
        write_atomically(DECOYS, _records(decoys_named(trials)))
    write_atomically(README, in_readme(README.read_text(encoding="utf-8"), kept_table()))


def _records(frame: pd.DataFrame) -> str:
    return frame.to_json(orient="records", indent=1) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
