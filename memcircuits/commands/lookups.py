"""`memcircuits lookups`: neurons that write the next token, and the heads that drive them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, Out, Seed, Top
from memcircuits.commands.output import Answer, print_notes, print_table, say_written


def lookups(
    inputs: Inputs,
    neurons: Annotated[
        int,
        typer.Option(
            min=1, help="Number of next-token neurons, and of random ones, in each upper layer."
        ),
    ] = 16,
    prompts: Annotated[
        int, typer.Option(min=2, help="Number of prompts of each neuron, of one paragraph each.")
    ] = 20,
    max_paragraphs: Annotated[
        int, typer.Option(min=2, help="Maximum number of paragraphs, drawn at random.")
    ] = 100,
    out: Out = Path("memcircuits-lookups"),
    top: Top = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Find neurons that write the next token and the heads that drive them, and test these heads.

    Printed is how well heads that add most to a neuron's input in some prompts lower its activation
    in others when they are removed (AUC; 0.5 is chance), for next-token neurons and for random
    ones; then the neurons. Writes lookups.safetensors and lookups.html.

    Example: memcircuits lookups --neurons 8
    """
    import memcircuits as mc
    from memcircuits.display.pages import Page, Table

    model, paragraphs = inputs.load()
    result = mc.lookups(
        model,
        paragraphs,
        neurons=neurons,
        prompts=prompts,
        max_paragraphs=max_paragraphs,
        seed=seed,
        progress=inputs.progress,
    )
    blocks = [result.block(), Table(result.to_frame(), title="Neurons")]
    page = Page("Neurons that write the next token", blocks, str(result))
    written = [result.save(out / "lookups.safetensors"), page.save(out / "lookups.html")]
    say_written(written, inputs.quiet)
    frame = result.to_frame().sort_values("congruence", ascending=False, kind="stable")
    if json:
        Answer(
            "lookups",
            summary=str(result),
            tables={"kinds": result.summary(), "neurons": frame},
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    print_table(result.summary())
    typer.echo("head: active in most prompts (rate); drop: share of the activation lost without it")
    print_table(frame.head(top))
    print_notes(result.notes)
