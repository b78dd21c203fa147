"""`memcircuits circuit`: the edges between heads and MLPs that carry a recitation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, Out, Seed, Top, existing
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import memorized_only


def circuit(
    inputs: Inputs,
    row: Annotated[
        str | None,
        typer.Option(help="Paragraph, by id; by default, the first memorized one."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            callback=existing,
            help="File of texts that removed edges carry; by default, the paragraph's tokens in "
            "random orders.",
        ),
    ] = None,
    faithfulness: Annotated[
        float, typer.Option(help="Share of the loss's difference that the circuit restores.")
    ] = 0.8,
    draws: Annotated[
        int, typer.Option(min=1, help="Number of random orders, and of random circuits.")
    ] = 4,
    verify: Annotated[
        int, typer.Option(min=0, help="Number of edges that are patched exactly.")
    ] = 16,
    out: Out = Path("memcircuits-circuit"),
    top: Top = 20,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Find the paths between heads and MLPs that carry the recitation of one paragraph.

    Printed are the edges with the largest effects: the rise of the loss without them, estimated
    (score) and exact; then how much of the recitation circuits of several sizes restore, beside
    random ones. Writes circuit.safetensors and circuit.html.

    Example: memcircuits circuit --draws 1 --verify 4
    """
    import memcircuits as mc
    from memcircuits.base.errors import InputError
    from memcircuits.display.pages import Page

    model, paragraphs = inputs.load()
    if row is None:
        chosen = memorized_only(inputs, model, paragraphs)[0]
    elif row in paragraphs.names:
        chosen = paragraphs[paragraphs.names.index(row)]
    else:
        raise InputError("--row", row, "give the id of one of --paragraphs")
    result = mc.recitation_circuit(
        model,
        chosen,
        reference=None if reference is None else inputs.read(reference, model, "--reference"),
        faithfulness=faithfulness,
        draws=draws,
        verify=verify,
        seed=seed,
        progress=inputs.progress,
    )
    page = Page("The circuit of a recitation", result.blocks(), str(result))
    written = [result.save(out / "circuit.safetensors"), page.save(out / "circuit.html")]
    say_written(written, inputs.quiet)
    frame, curve = result.to_frame(), result.curve_frame()
    if json:
        Answer(
            "circuit",
            summary=str(result),
            values={"faithfulness": result.faithfulness, "nll": result.nll.tolist()},
            tables={"edges": frame, "curve": curve},
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(str(result))
    table = frame.head(top)
    source = table["source"] + " " + table["source_positions"]
    target = table["target"] + " " + table["target_positions"]
    numbers = table[["score", "score_low", "score_high", "exact"]]
    print_table(numbers.assign(source=source, target=target)[["source", "target", *numbers]])
    print_table(curve)
    print_notes(result.provenance.notes)
