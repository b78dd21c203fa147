"""`memcircuits formation`: when a recitation forms, over the checkpoints of a training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs, load
from memcircuits.commands.options import Control, Json, Out, Seed
from memcircuits.commands.output import Answer, print_table, say_written


def formation(
    inputs: Inputs,
    checkpoints: Annotated[
        str,
        typer.Option(help="Steps and models, for instance 0=organism,400=organism-planted."),
    ],
    twins: Annotated[
        str | None,
        typer.Option(help="Models not trained on the paragraphs: one, or one for each step."),
    ] = None,
    control: Control = None,
    by: Annotated[
        str | None, typer.Option(help="Column that groups the paragraphs, such as repetitions.")
    ] = None,
    max_heads: Annotated[
        int,
        typer.Option(
            "--max-paragraphs", min=0, help="Number of paragraphs whose heads are measured."
        ),
    ] = 8,
    out: Out = Path("memcircuits-formation"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure paragraphs at every checkpoint: EM, bits that a twin lacks, and where these are.

    One model is loaded at a time; --model only reads the paragraphs. With controls, which no
    training saw, the effect of training is a difference in differences. Writes
    formation.safetensors and formation.html.

    Example: memcircuits formation --checkpoints 0=organism,400=organism-planted --max-paragraphs 0
    """
    import memcircuits as mc
    from memcircuits.base.io import write_atomically

    steps = _models(inputs, "--checkpoints", checkpoints)
    twin_steps: Any = None
    if twins is not None:
        twin_steps = (
            _models(inputs, "--twins", twins)
            if "=" in twins
            else partial(load, twins, inputs.quiet, "--twins", **inputs.loading)
        )
    model, paragraphs = inputs.load()
    result = mc.formation(
        steps,
        paragraphs,
        twins=twin_steps,
        control=None if control is None else inputs.read(control, model, "--control"),
        max_paragraphs=max_heads,
        seed=seed,
        progress=inputs.progress,
    )
    frame = result.to_frame(by, seed=seed)
    page = result.figure(by).to_html(include_plotlyjs=True)
    written = [
        result.save(out / "formation.safetensors"),
        write_atomically(out / "formation.html", page),
    ]
    say_written(written, inputs.quiet)
    if json:
        Answer(
            "formation",
            summary=str(result),
            tables={"steps": frame, "agreement": result.agreement()},
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(str(result))
    print_table(frame)
    if result.measured:
        typer.echo("\nrank correlation over heads:")
        print_table(result.agreement())


def _models(inputs: Inputs, option: str, text: str) -> dict[int, Callable[[], Any]]:
    """`0=organism,400=folder` as functions that load the models."""
    from memcircuits.base.errors import InputError

    models: dict[int, Callable[[], Any]] = {}
    for part in text.split(","):
        step, equals, name = part.strip().partition("=")
        if not (equals and name and step.isdecimal() and len(step) < 19):
            raise InputError(option, repr(part), "write it like 0=organism,400=folder")
        models[int(step)] = partial(load, name, inputs.quiet, option, **inputs.loading)
    return models
