"""`memcircuits influence`: which text teaches which, by one gradient step on each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, MaxMemorized, Out, Seed, Top, existing
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import draw, memorized_only, names


def influence(
    inputs: Inputs,
    candidates: Annotated[
        Path | None,
        typer.Option(
            callback=existing,
            help="File of texts that may have taught them; by default, themselves.",
        ),
    ] = None,
    eta: Annotated[float, typer.Option(help="Size of the step; negative to unlearn.")] = 1e-6,
    where: Annotated[
        str | None, typer.Option(help="Step only in these weights, for instance L1H2,L0.mlp.")
    ] = None,
    within: Annotated[
        bool,
        typer.Option("--within", help="Step on pieces of each prefix, test its continuation."),
    ] = False,
    max_paragraphs: MaxMemorized = 20,
    out: Out = Path("memcircuits-influence"),
    top: Top = 20,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Take one gradient step on each text, and measure what it does to every recitation.

    Names the text that helps each recitation most. A negative step is one of unlearning: what it
    harms. Writes influence.safetensors and influence.html.

    Example: memcircuits influence --max-paragraphs 8
    """
    import memcircuits as mc
    from memcircuits.display.pages import Page

    model, paragraphs = inputs.load()
    tested = draw(memorized_only(inputs, model, paragraphs), max_paragraphs, seed)
    trained = tested if candidates is None else inputs.read(candidates, model, "--candidates")
    result = mc.influence(
        model,
        trained,
        None if within else tested,
        eta,
        where=names(where),
        within=within,
        progress=inputs.progress,
    )
    page = Page("Which text teaches which", [result.block()], str(result))
    written = [
        result.save(out / "influence.safetensors"),
        page.save(out / "influence.html"),
    ]
    say_written(written, inputs.quiet)
    frame = result.to_frame() if within else result.teachers()
    if json:
        Answer(
            "influence",
            summary=str(result),
            tables={"within" if within else "teachers": frame},
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(str(result))
    print_table(frame.head(top))
    print_notes(result.notes)
