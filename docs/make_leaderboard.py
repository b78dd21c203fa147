"""Write docs/leaderboard.md, its picture and README's table from finished trials.

memcircuits bench localize --seed 1000 --out bench
python docs/make_leaderboard.py bench

Methods were chosen while trials of lower seeds were looked at, so those are not reported. Where
only some localizers have changed, `memcircuits bench localize --seed 1000 --localizers NAMES --out
bench` and `python docs/make_leaderboard.py bench NAMES` measure these on the same trials and
replace their rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from memcircuits.base.io import write_atomically
from memcircuits.benchmark.leaderboard import leaderboard, leaderboard_figure
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.trials import read_run, read_trials

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
NUMBERS = DOCS / "leaderboard.json"
UNSEEN = 1000  # trials of lower seeds were looked at while methods were chosen
START, STOP = "<!-- localization: memcircuits bench localize -->", "<!-- /localization -->"
AGAIN = (
    "measured again in later runs of the same trials, in the tables of what was written and what "
    "is silenced; what else is told of it is of the first run."
)
SHOWN = {
    "find_memorization_heads": "`find_memorization_heads`",
    "find_memorization_heads (screen)": 'the same, `method="screen"`',
    "integrated-gradients": "integrated gradients",
    "exact-patching": "exact patching",
    "gradient-max": "largest gradient (the paper's map)",
    "hard-concrete": "hard concrete mask",
    "rare-token-attention": "attention to rare tokens",
    "random": "random",
}
HEAD = """# Leaderboard of localizers

Written by `memcircuits bench localize` and `python docs/make_leaderboard.py`. What the words mean:
[choosing evidence](evidence.md).

![Recall@1 of every localizer](pictures/leaderboard.png)

"""


def short_table(frame: pd.DataFrame) -> str:
    """README's table: single-head trials, some of the localizers."""
    rows = frame[frame["kind"] == "head"].set_index("localizer")
    lines = [
        f"| {rows['trials'].iloc[0]} paragraphs, each through one head | right head first | "
        "AUC | forward passes |",
        "| --- | --- | --- | --- |",
    ]
    for name, shown in SHOWN.items():
        row = rows.loc[name]
        lines.append(
            f"| {shown} | {100 * row['recall_at_1']:.0f} % ({100 * row['recall_at_1_low']:.0f} to "
            f"{100 * row['recall_at_1_high']:.0f}) | {row['auc']:.2f} | {row['forwards']:.0f} |"
        )
    return "\n".join(lines)


def in_readme(text: str, frame: pd.DataFrame) -> str:
    """README with the table between its marks made from the numbers."""
    before, _, rest = text.partition(START)
    _, mark, after = rest.partition(STOP)
    return f"{before}{START}\n{short_table(frame)}\n{STOP}{after}" if mark else text


def main(folder: str, *names: str) -> None:
    if read_run(folder).options.seed < UNSEEN:
        sys.exit(
            f"seed: methods were chosen on trials of these seeds; run them with {UNSEEN} or more"
        )
    trials = read_trials(folder)
    write_leaderboard(trials, folder)
    frame = leaderboard(trials)
    page = HEAD + (Path(folder) / "leaderboard.md").read_text(encoding="utf-8")
    if names:
        old = pd.read_json(NUMBERS, orient="records")
        frame = replaced(old, frame[frame["localizer"].isin(names)])
        page = with_rows((DOCS / "leaderboard.md").read_text(encoding="utf-8"), page, names)
        again = f"- {', '.join(names)}: {AGAIN}\n"
        if again not in page:
            page = page.replace("\n**", f"{again}\n**", 1)
    write_atomically(DOCS / "leaderboard.md", page)
    write_atomically(NUMBERS, frame.to_json(orient="records", indent=1) + "\n")
    write_atomically(README, in_readme(README.read_text(encoding="utf-8"), frame))
    leaderboard_figure(frame).write_image(DOCS / "pictures" / "leaderboard.png")


def replaced(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The old numbers with those of the same kind and localizer from the new ones."""
    both, fresh = (frame.set_index(["kind", "localizer"]) for frame in (old, new))
    here = fresh.index.intersection(both.index)
    assert (both.loc[here, "trials"] == fresh.loc[here, "trials"]).all(), "other trials"
    both.loc[here] = fresh.loc[here]
    return both.reset_index().astype(old.dtypes)


def with_rows(old: str, new: str, names: Sequence[str]) -> str:
    """The old page with the rows of some localizers from the new one, table by table."""
    rows: dict[tuple[str, str], str] = {}
    for title, name, line in table_rows(new):
        if name in names:
            rows[title, name] = line
    lines = [
        rows.get((title, name), line) if title.startswith(("**Written", "**Silencing")) else line
        for title, name, line in table_rows(old)
    ]
    return "\n".join(lines) + "\n"


def table_rows(page: str) -> Iterator[tuple[str, str, str]]:
    """Every line with the title above it and, in tables, its first cell."""
    title = ""
    for line in page.splitlines():
        if line.startswith("**"):
            title = line
        yield title, line.split("|")[1].strip() if line.startswith("| ") else "", line


if __name__ == "__main__":
    main(*sys.argv[1:])
