"""`memcircuits bench localize`: who finds what was planted? A leaderboard of localizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands.selection import names


def localize(
    source: c.Source,
    out: c.Out = Path("memcircuits-bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A few trials of each kind.")] = False,
    localizers: Annotated[
        str | None, typer.Option(help="Score only these, with commas; by default all.")
    ] = None,
    n_paragraphs: Annotated[
        int, typer.Option("--planted", min=1, help="Paragraphs written together in each trial.")
    ] = 1,
    num_shards: Annotated[
        int, typer.Option(min=1, help="Processes that share the trials, each with its index.")
    ] = 1,
    shard_index: Annotated[int, typer.Option(min=0, help="Which of them this is.")] = 0,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Write paragraphs into random places of the model and score every localizer on finding them.

    Every trial is a file in OUT: run the command again to go on where it was. Writes
    leaderboard.parquet, leaderboard.md, leaderboard.html and leaderboard-figure.html.

    Example: memcircuits bench localize --quick --out bench
    """
    from memcircuits.benchmark.kinds import N_QUICK_TRIALS, N_TRIALS
    from memcircuits.benchmark.leaderboard import leaderboard
    from memcircuits.benchmark.metrics import METRICS
    from memcircuits.benchmark.pages import write_leaderboard
    from memcircuits.benchmark.paragraph_pool import ParagraphPool
    from memcircuits.benchmark.trials import read_trials, run_trials
    from memcircuits.core.errors import InputError

    if shard_index >= num_shards:
        raise InputError("--shard-index", shard_index, f"give less than {num_shards}")
    loaded, given = source.load()
    pool = ParagraphPool.of(loaded, given, source.unigrams(None))
    run_trials(
        pool,
        out,
        counts=N_QUICK_TRIALS if quick else N_TRIALS,
        localizers=names(localizers),
        n_paragraphs=n_paragraphs,
        seed=seed,
        shard=(shard_index, num_shards),
        progress=not source.quiet,
    )
    if num_shards > 1:
        c.say(
            "this share is done; run once more without --num-shards for the leaderboard",
            source.quiet,
        )
        return
    trials = read_trials(out)
    frame = leaderboard(trials)
    if json:
        c.print_json({"leaderboard": c.records(frame)})
    else:
        columns = ["kind", "localizer", "trials", *METRICS, "forwards"]
        c.print_table(frame[columns])
    for path in write_leaderboard(trials, out):
        c.say(f"wrote {path}", source.quiet)
