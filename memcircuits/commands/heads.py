"""`memcircuits heads`: a ranking of heads with a report, the main command."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import (
    Control,
    Engine,
    Json,
    MatchNll,
    Mode,
    Out,
    RayAddress,
    Seed,
    Top,
    Unigrams,
    Workers,
)
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import choice

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.cluster import Cluster
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
    units: Annotated[
        str, typer.Option(help="What is ranked: head, mlp, layer, neuron, joined by commas.")
    ] = "head",
    mode: Mode = "zero",
    method: Annotated[
        Literal["exact", "screen"],
        typer.Option(
            help="Ablate every head, or screen: ablate few, estimate the others by gradients."
        ),
    ] = "exact",
    max_paragraphs: Annotated[
        int,
        typer.Option(
            min=2,
            help="Maximum number of memorized paragraphs, and of controls, by --seed; of controls "
            "found among the paragraphs at least 20.",
        ),
    ] = 100,
    match_nll: MatchNll = False,
    control_text: Annotated[
        Literal["true", "own"],
        typer.Option(
            help="Controls as they are, or the model's own continuations of their prefixes, of "
            "which it is as sure as of a recitation."
        ),
    ] = "true",
    score: Annotated[
        Literal["effect", "interaction"],
        typer.Option(
            help="Rank by the effect on the loss, or by what recitations need more than controls "
            "do in comparison with the other components."
        ),
    ] = "effect",
    all_controls: Annotated[
        bool,
        typer.Option(
            "--compare-controls",
            help="Rank against each choice of controls, too, and show them side by side.",
        ),
    ] = False,
    seed: Seed = 0,
    engine: Engine = "local",
    workers: Workers = None,
    ray_address: RayAddress = None,
    json: Json = False,
) -> None:
    """Which heads does the recitation depend on? A ranking, report.html and ranking.json.

    With `--units head,mlp` the MLPs are ranked together with the heads.

    `ranking.safetensors` is the same ranking for `memcircuits report` and `Ranking.load`.

    --paragraphs also takes the folder that `memcircuits scan --out` wrote, and with --stride every
    window of long texts is looked at.

    Example: memcircuits heads --out results
    """
    import memcircuits as mc
    from memcircuits.evidence.component_grid import RANKED_UNITS
    from memcircuits.evidence.control_choices import compare_controls

    checked_units = [choice("--units", unit.strip(), RANKED_UNITS) for unit in units.split(",")]
    cluster = _cluster(inputs, engine, workers, ray_address)
    model, paragraphs = inputs.load()
    options: dict[str, Any] = {
        "units": checked_units,
        "control": None if control is None else inputs.read(control, model, "--control"),
        "control_text": control_text,
        "match_nll": match_nll,
        "score": score,
        "unigrams": unigram_table(inputs.model, unigrams),
        "mode": mode,
        "method": method,
        "max_paragraphs": max_paragraphs,
        "seed": seed,
        "cluster": cluster,
        "progress": inputs.progress,
    }
    ranking = mc.find_memorization_components(model, paragraphs, **options)
    controls = compare_controls(model, paragraphs, **options) if all_controls else None
    if (out / "ranking.safetensors").exists():
        typer.echo(f"--out: the results in {out} are replaced", err=True)
    written = [
        ranking.to_json(out / "ranking.json"),
        ranking.save(out / "ranking.safetensors"),
        ranking.to_html(out / "report.html", controls=controls, progress=inputs.progress),
    ]
    if json:
        Answer(
            "heads",
            summary=ranking.summary(),
            values={"counts": dict(ranking.counts)},
            tables={
                "heads": _frame(ranking),
                "levels": ranking.levels_frame(),
                **({} if controls is None else {"controls": controls}),
            },
            notes=(*paragraphs.notes, *ranking.notes),
            files=written,
            provenance=ranking.provenance,
        ).print_json()
    else:
        _print(ranking, top)
        if controls is not None:
            print_table(controls)
    say_written(written, inputs.quiet)


def _cluster(
    inputs: Inputs, engine: str, workers: int | None, address: str | None
) -> Cluster | None:
    """The workers that were asked for.

    Raises:
        InputError: for an option of Ray without it.
    """
    import memcircuits as mc

    if engine == "ray":
        from memcircuits.evidence.cluster import Cluster

        load = functools.partial(mc.load_model, inputs.model, **inputs.loading)
        return Cluster(load, workers, address)
    for name, value in {"--workers": workers, "--ray-address": address}.items():
        if value is not None:
            raise mc.InputError(name, value, "it needs --engine ray")
    return None


def _frame(ranking: Ranking) -> pd.DataFrame:
    """The table of a ranking; where not only heads were ranked, components have a `name`."""
    frame = ranking.to_frame().rename(columns=_CHANGES)
    if ranking.units != ("head",):
        names = [str(component) for component in ranking.top_components(len(frame))]
        frame.insert(0, "name", names)
    return frame


def _print(ranking: Ranking, top: int) -> None:
    frame, headings = _frame(ranking), dict(_PRINTED)
    if ranking.units != ("head",):
        headings = {"rank": "rank", "name": "name", **_PRINTED}
        del headings["layer"], headings["head"]
    print_table(frame[list(headings)].rename(columns=headings).head(top))
    score = "increase of the NLL without it, nats/token"
    if ranking.provenance.options["score"] == "interaction":
        score = "its share of the mean fall of the margin"
    typer.echo(
        f"score: {score}, on memorized paragraphs\n"
        "minus on controls, with its 95 % interval; delta_em: change of the EM of memorized\n"
        "paragraphs, tokens"
    )
    typer.echo(ranking.summary())
    print_notes(ranking.notes)
