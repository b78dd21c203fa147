"""`memcircuits heads`: a ranking of heads with a report, the main command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import (
    Control,
    Json,
    MatchNll,
    MaxParagraphs,
    Mode,
    Out,
    Seed,
    Top,
    Unigrams,
)
from memcircuits.commands.output import Answer, print_notes, print_table, say_written

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.ranking import Ranking

_PRINTED = {
    **{name: name for name in ("rank", "layer", "head", "score", "ci_low", "ci_high", "q_value")},
    "delta_em_memorized": "delta_em",
    **{name: name for name in ("significant", "delta_em_control", "gradient", "rare_token_tau")},
}
"""Columns that are printed, as far as they fit, and their headings."""

_CHANGES = {name: f"delta_{name}" for name in ("em_memorized", "em_control")}
"""Columns of a ranking that are changes when the head is removed, and what they are called here."""


def heads(
    inputs: Inputs,
    control: Control = None,
    unigrams: Unigrams = None,
    out: Out = Path("memcircuits-heads"),
    top: Top = 10,
    mode: Mode = "zero",
    method: Annotated[
        Literal["exact", "screen"],
        typer.Option(
            help="Ablate every head, or screen: ablate few, estimate the others by gradients."
        ),
    ] = "exact",
    max_paragraphs: MaxParagraphs = 100,
    match_nll: MatchNll = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Which heads does the recitation depend on? A ranking, report.html and ranking.json.

    `ranking.safetensors` is the same ranking for `memcircuits report` and `Ranking.load`.

    --paragraphs also takes the folder that `memcircuits scan --out` wrote, and with --stride every
    window of long texts is looked at.

    Example: memcircuits heads --out results
    """
    import memcircuits as mc

    model, paragraphs = inputs.load()
    ranking = mc.find_memorization_heads(
        model,
        paragraphs,
        control=None if control is None else inputs.read(control, model, "--control"),
        unigrams=unigram_table(inputs.model, unigrams),
        mode=mode,
        method=method,
        max_paragraphs=max_paragraphs,
        match_nll=match_nll,
        seed=seed,
        progress=inputs.progress,
    )
    if (out / "ranking.safetensors").exists():
        typer.echo(f"--out: the results in {out} are replaced", err=True)
    written = [
        ranking.to_json(out / "ranking.json"),
        ranking.save(out / "ranking.safetensors"),
        ranking.to_html(out / "report.html", progress=inputs.progress),
    ]
    if json:
        Answer(
            "heads",
            summary=ranking.summary(),
            values={"counts": dict(ranking.counts)},
            tables={"heads": _frame(ranking)},
            notes=(*paragraphs.notes, *ranking.notes),
            files=written,
            provenance=ranking.provenance,
        ).print_json()
    else:
        _print(ranking, top)
    say_written(written, inputs.quiet)


def _frame(ranking: Ranking) -> pd.DataFrame:
    return ranking.to_frame().rename(columns=_CHANGES)


def _print(ranking: Ranking, top: int) -> None:
    print_table(_frame(ranking)[list(_PRINTED)].rename(columns=_PRINTED).head(top))
    typer.echo(
        "score: increase of the NLL without the head, nats/token, on memorized paragraphs\n"
        "minus on controls, with its 95 % interval; delta_em: change of the EM of memorized\n"
        "paragraphs, tokens"
    )
    typer.echo(ranking.summary())
    print_notes(ranking.notes)
