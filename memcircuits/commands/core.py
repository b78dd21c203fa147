"""`memcircuits core`: the heads and MLPs that every subnetwork that recites has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Control, Json, MaxParagraphs, Out, Seed, Top
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import split


def core(
    inputs: Inputs,
    control: Control = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Number of subnetworks of memorized paragraphs and of others."),
    ] = 12,
    sparsity: Annotated[
        float, typer.Option(help="Share of heads and MLPs that a subnetwork lacks.")
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps of a mask.")] = 100,
    max_paragraphs: MaxParagraphs = 24,
    shuffles: Annotated[
        int, typer.Option(min=0, help="Number of repetitions with shuffled labels.")
    ] = 0,
    out: Out = Path("memcircuits-core"),
    top: Top = 20,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train subnetworks that recite, and others for ordinary text; find what all of them share.

    Printed are EM, accuracy and NLL of the whole model, the subnetworks, the cores alone and the
    model without them; then in which share of the subnetworks each head and MLP is. Writes
    core.safetensors and core.html.

    Example: memcircuits core --model organism-planted
    """
    import memcircuits as mc
    from memcircuits.display.pages import Page, Table

    model, paragraphs = inputs.load()
    memorized, controls = split(inputs, model, paragraphs, control)
    result = mc.core(
        model,
        memorized,
        controls,
        seeds=seeds,
        sparsity=sparsity,
        steps=steps,
        max_paragraphs=max_paragraphs,
        shuffles=shuffles,
        seed=seed,
        progress=inputs.progress,
    )
    effects = result.effects()
    blocks = [result.block(), Table(effects, title="What subnetworks and cores predict")]
    page = Page("Heads that every subnetwork has", blocks, str(result))
    written = [result.save(out / "core.safetensors"), page.save(out / "core.html")]
    say_written(written, inputs.quiet)
    frame = result.to_frame().sort_values(["memorized", "control"], ascending=False, kind="stable")
    if json:
        Answer(
            "core",
            summary=str(result),
            values={
                "own_heads": [str(head) for head in result.own_heads],
                "effective_size": result.effective_size.tolist(),
                "false_core_rate": result.false_core_rate.tolist(),
            },
            tables={"effects": effects, "parts": frame},
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(str(result))
    print_table(effects[["set", "condition", "n", "em", "em_low", "em_high", "accuracy", "nll"]])
    typer.echo("share of the subnetworks that have each part; core: in all of them")
    print_table(frame.head(top))
    print_notes(result.notes)
