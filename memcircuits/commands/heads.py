"""`memcircuits heads`: the main job, a ranking of heads with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c


def heads(
    source: c.Source,
    control: Annotated[
        Path | None, typer.Option(help="File of controls; by default paragraphs with a low EM.")
    ] = None,
    unigrams: Annotated[
        Path | None, typer.Option(help="Unigram table (.safetensors) that defines rarity.")
    ] = None,
    out: c.Out = Path("memcircuits-heads"),
    top: Annotated[int, typer.Option(min=1, help="Rows of the table printed.")] = 10,
    mode: Annotated[str, typer.Option(help="Ablation: zero, mean or resample.")] = "zero",
    method: Annotated[
        str, typer.Option(help="exact, or screen: fewer heads ablated, the others estimated.")
    ] = "exact",
    max_paragraphs: Annotated[
        int,
        typer.Option(
            min=2, help="Measure at most so many memorized paragraphs, and controls (at least 20)."
        ),
    ] = 100,
    match_nll: Annotated[
        bool, typer.Option("--match-nll", help="Controls nearest in NLL, not drawn.")
    ] = False,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Which heads does the recitation hang on? A ranking, report.html and ranking.json.

    `ranking.safetensors` is the same ranking for `memcircuits report` and `Ranking.load`.

    Example: memcircuits heads --out results
    """
    import memcircuits as mc

    loaded, given = source.load()
    controls = None if control is None else source.read(control, loaded)
    ranking = mc.find_memorization_heads(
        loaded,
        given,
        control=controls,
        unigrams=source.unigrams(unigrams),
        mode=mode,
        method=method,
        max_paragraphs=max_paragraphs,
        match_nll=match_nll,
        seed=seed,
        progress=not source.quiet,
    )
    written = [
        ranking.to_json(out / "ranking.json"),
        ranking.save(out / "ranking.safetensors"),
        ranking.to_html(out / "report.html", progress=not source.quiet),
    ]
    if json:
        c.print_json(
            {
                "summary": ranking.summary(),
                "counts": dict(ranking.counts),
                "heads": c.records(ranking.to_frame()),
            }
        )
    else:
        columns = [
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
        c.print_table(ranking.to_frame()[columns].head(top))
        typer.echo(
            "Without the head: score, more nats/token on memorized paragraphs than on controls "
            "(95 % interval); em_*, tokens more or fewer recited.\ngradient: largest |dL/dw|, "
            "nats/token per unit of weight. rare_token_tau < 0: it looks at rare tokens."
        )
        typer.echo(ranking.summary())
        for note in ranking.notes:
            typer.echo(f"Note: {note}")
    for path in written:
        c.say(f"wrote {path}", source.quiet)
