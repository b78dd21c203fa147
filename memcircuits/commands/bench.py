"""`memcircuits bench localize`: a leaderboard of methods that look for planted paragraphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import Json, Out, Seed
from memcircuits.commands.output import print_json, print_table, records, say, say_written
from memcircuits.commands.selection import names


def localize(
    inputs: Inputs,
    out: Out = Path("memcircuits-bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only a few trials of each kind.")
    ] = False,
    localizers: Annotated[
        str | None, typer.Option(help="Score only these, with commas; by default, all.")
    ] = None,
    n_paragraphs: Annotated[
        int,
        typer.Option("--planted", min=1, help="Number of paragraphs planted in each trial."),
    ] = 1,
    num_shards: Annotated[
        int, typer.Option(min=1, help="Number of processes that share the trials.")
    ] = 1,
    shard_index: Annotated[
        int, typer.Option(min=0, help="Index of this process among them, from 0.")
    ] = 0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write paragraphs into random places of the model, and score how localizers find them.

    Every trial is a file in OUT: run the command again to continue after an interruption. Writes
    leaderboard.parquet, leaderboard.md, leaderboard.html and leaderboard-figure.html.

    Example: memcircuits bench localize --quick --out bench
    """
    from memcircuits.benchmark.leaderboard import leaderboard
    from memcircuits.benchmark.metrics import METRICS
    from memcircuits.benchmark.pages import write_leaderboard
    from memcircuits.benchmark.paragraph_pool import ParagraphPool
    from memcircuits.benchmark.trial_kinds import N_QUICK_TRIALS, N_TRIALS
    from memcircuits.benchmark.trials import read_trials, run_trials
    from memcircuits.core.errors import InputError

    if shard_index >= num_shards:
        raise InputError("--shard-index", shard_index, f"give less than {num_shards}")
    model, paragraphs = inputs.load()
    run_trials(
        ParagraphPool.of(model, paragraphs, unigram_table(inputs.model, None)),
        out,
        counts=N_QUICK_TRIALS if quick else N_TRIALS,
        localizers=names(localizers),
        n_paragraphs=n_paragraphs,
        seed=seed,
        shard=(shard_index, num_shards),
        progress=inputs.progress,
    )
    if num_shards > 1:
        say(
            "this shard is finished; run once more without --num-shards for the leaderboard",
            inputs.quiet,
        )
        return
    trials = read_trials(out)
    frame = leaderboard(trials)
    if json:
        print_json({"leaderboard": records(frame)})
    else:
        print_table(frame[["kind", "localizer", "trials", *METRICS, "forwards"]])
    say_written(write_leaderboard(trials, out), inputs.quiet)
