"""`memcircuits heads`: a ranking of heads with a report, the main command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import Control, Json, Out, Seed, Top, Unigrams
from memcircuits.commands.output import (
    print_json,
    print_notes,
    print_table,
    records,
    say_written,
)
from memcircuits.commands.selection import choice

if TYPE_CHECKING:
    from memcircuits.evidence.ranking import Ranking

_COLUMNS = [
    "rank",
    "layer",
    "head",
    "score",
    "ci_low",
    "ci_high",
    "q_value",
    "significant",
    "em_memorized",
    "em_control",
    "gradient",
    "rare_token_tau",
]


def heads(
    inputs: Inputs,
    control: Control = None,
    unigrams: Unigrams = None,
    out: Out = Path("memcircuits-heads"),
    top: Top = 10,
    mode: Annotated[str, typer.Option(help="Ablation: zero, mean or resample.")] = "zero",
    method: Annotated[
        str,
        typer.Option(help="exact, or screen: ablate few heads, estimate the others by gradients."),
    ] = "exact",
    max_paragraphs: Annotated[
        int,
        typer.Option(
            min=2,
            help="Maximum number of memorized paragraphs measured, and of controls (at least 20).",
        ),
    ] = 100,
    match_nll: Annotated[
        bool,
        typer.Option("--match-nll", help="Choose the controls nearest in NLL, not at random."),
    ] = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Which heads does the recitation depend on? A ranking, report.html and ranking.json.

    `ranking.safetensors` is the same ranking for `memcircuits report` and `Ranking.load`.

    Example: memcircuits heads --out results
    """
    import memcircuits as mc
    from memcircuits.evidence.ablation import Mode
    from memcircuits.evidence.screening import Method

    checked_mode = choice("--mode", mode, get_args(Mode))
    checked_method = choice("--method", method, get_args(Method))
    model, paragraphs = inputs.load()
    ranking = mc.find_memorization_heads(
        model,
        paragraphs,
        control=None if control is None else inputs.read(control, model),
        unigrams=unigram_table(inputs.model, unigrams),
        mode=checked_mode,
        method=checked_method,
        max_paragraphs=max_paragraphs,
        match_nll=match_nll,
        seed=seed,
        progress=inputs.progress,
    )
    written = [
        ranking.to_json(out / "ranking.json"),
        ranking.save(out / "ranking.safetensors"),
        ranking.to_html(out / "report.html", progress=inputs.progress),
    ]
    if json:
        print_json(
            {
                "summary": ranking.summary(),
                "counts": dict(ranking.counts),
                "heads": records(ranking.to_frame()),
            }
        )
    else:
        _print(ranking, top)
    say_written(written, inputs.quiet)


def _print(ranking: Ranking, top: int) -> None:
    print_table(ranking.to_frame()[_COLUMNS].head(top))
    typer.echo(
        "score: increase of the NLL (nats/token) without the head, on memorized paragraphs minus "
        "on controls, with its 95 % interval;\nem_*: change of the recited tokens without the "
        "head; gradient: largest |dL/dw|, nats/token per unit of weight;\nrare_token_tau: below 0, "
        "the head attends to rare tokens."
    )
    typer.echo(ranking.summary())
    print_notes(ranking.notes)
