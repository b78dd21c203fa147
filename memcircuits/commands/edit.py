"""`memcircuits edit`: give memorized prefixes another continuation by changing few weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, Out, existing
from memcircuits.commands.shared_by_edits import EditOptions, EditTask, report_edit


def edit(
    inputs: Inputs,
    options: EditOptions,
    rewritten: Annotated[
        Path | None,
        typer.Option(
            callback=existing,
            help="File with the paragraphs of --paragraphs, row by row, and the wanted "
            "continuations; by default, the model's own continuations after the most destructive "
            "perturbation of the prefix.",
        ),
    ] = None,
    out: Out = Path("memcircuits-edit"),
    json: Json = False,
) -> None:
    """Change few weights so that memorized prefixes are continued with another text.

    With --rewritten, all of --paragraphs are edited. Writes edit.safetensors, and with --export a
    model folder.

    Example: memcircuits edit --targets 1 --export rewritten
    """
    from memcircuits.editing.rewriting import edit as find_edit
    from memcircuits.evidence.triggers.perturbation import perturb_prefix

    task = EditTask.load(inputs, options, paired=rewritten is not None)
    if rewritten is not None:
        targets, wanted = (
            task.paragraphs,
            inputs.read(rewritten, task.model, "--rewritten", strict=True),
        )
    else:
        targets, wanted = perturb_prefix(
            task.model, task.targets, seed=options.seed, progress=inputs.progress
        ).pairs()
    task = dataclasses.replace(task, targets=targets)
    result = find_edit(
        task.model,
        task.targets,
        wanted,
        task.keep,
        **options.search(progress=inputs.progress),
    )
    report_edit(result, task, inputs, out=out, export=options.export, json=json, wanted=wanted)
