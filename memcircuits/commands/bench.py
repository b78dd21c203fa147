"""`memcircuits bench`: leaderboards of methods that look for paragraphs, planted or trained in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memcircuits.commands.inputs import Inputs, load, load_twin, unigram_table
from memcircuits.commands.options import Json, Out, Seed, Twin
from memcircuits.commands.output import Answer, print_table, say, say_written
from memcircuits.commands.selection import names

if TYPE_CHECKING:
    from pandas import DataFrame


def localize(
    inputs: Inputs,
    out: Out = Path("memcircuits-bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only a few trials of each kind.")
    ] = False,
    kinds: Annotated[
        str | None, typer.Option(help="Only these kinds of trial, with commas; by default, all.")
    ] = None,
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
    from memcircuits.base.errors import InputError, one_of
    from memcircuits.benchmark.leaderboard import leaderboard
    from memcircuits.benchmark.metrics import METRICS
    from memcircuits.benchmark.pages import write_leaderboard
    from memcircuits.benchmark.paragraph_pool import ParagraphPool
    from memcircuits.benchmark.trial_kinds import N_QUICK_TRIALS, N_TRIALS
    from memcircuits.benchmark.trials import read_trials, run_trials

    if shard_index >= num_shards:
        raise InputError("--shard-index", shard_index, f"give less than {num_shards}")
    counts = N_QUICK_TRIALS if quick else N_TRIALS
    chosen = names(kinds) or list(counts)
    for kind in chosen:
        one_of("--kinds", kind, counts)
    counts = {kind: n for kind, n in counts.items() if kind in chosen}
    model, paragraphs = inputs.load()
    run_trials(
        ParagraphPool.of(model, paragraphs, unigram_table(inputs.model, None)),
        out,
        counts=counts,
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
        _answer("localize", frame, out).print_json()
    else:
        print_table(frame[["kind", "localizer", "trials", *METRICS, "forwards"]])
    say_written(write_leaderboard(trials, out), inputs.quiet)


@dataclass(frozen=True)
class NaturalOptions:
    """How many trials there are, of which paragraphs and localizers."""

    trials: Annotated[int, typer.Option(min=1, help="Number of trials in each direction.")] = 8
    n_paragraphs: Annotated[
        int, typer.Option("--per-trial", min=1, help="Number of paragraphs of each trial.")
    ] = 4
    localizers: Annotated[
        str | None, typer.Option(help="Score only these, with commas; by default, all.")
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only two trials of two paragraphs each.")
    ] = False
    seed: Seed = 0


def natural(
    inputs: Inputs,
    options: NaturalOptions,
    twin: Twin = None,
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise-twin",
            help="Model trained on the paragraphs of --model in another order: the floor.",
        ),
    ] = None,
    out: Out = Path("memcircuits-natural"),
    json: Json = False,
) -> None:
    """Score how localizers find what training wrote, by exchanging heads with a twin.

    The paragraphs are sorted by their column role (organism, twin, neither), or without one by
    which model recites them. Every trial is a file in OUT: run the command again to continue after
    an interruption. Writes natural.parquet, natural.json, natural.md and natural.html.

    Example: memcircuits bench natural --quick --out natural
    """
    from memcircuits.benchmark.natural import natural_leaderboard, write_natural_leaderboard
    from memcircuits.benchmark.natural_trials import (
        Twins,
        read_natural_trials,
        run_natural_trials,
    )

    model, paragraphs = inputs.load()
    twins = Twins.of(
        model,
        load_twin(inputs, twin),
        paragraphs,
        noise=None
        if noise is None
        else load(noise, inputs.quiet, "--noise-twin", **inputs.loading),
        unigrams=unigram_table(inputs.model, None),
    )
    run_natural_trials(
        twins,
        out,
        n_trials=2 if options.quick else options.trials,
        n_paragraphs=2 if options.quick else options.n_paragraphs,
        localizers=names(options.localizers),
        seed=options.seed,
        progress=inputs.progress,
    )
    trials = read_natural_trials(out)
    frame = natural_leaderboard(trials, seed=options.seed)
    if json:
        _answer("natural", frame, out).print_json()
    else:
        print_table(frame.drop(columns=["reference"]))
    say_written(write_natural_leaderboard(trials, out, seed=options.seed), inputs.quiet)


def _answer(benchmark: str, frame: DataFrame, out: Path) -> Answer:
    return Answer(
        f"bench {benchmark}",
        summary=f"{frame['localizer'].nunique()} localizers",
        tables={"leaderboard": frame},
        files=[out],
    )
