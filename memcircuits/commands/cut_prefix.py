"""`memcircuits cut-prefix`: what is recited when the prefix is cut inside a token?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, MaxMemorized, Out, Seed
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import draw, memorized_only, names


def cut_prefix(
    inputs: Inputs,
    cuts: Annotated[
        str, typer.Option(help="Bytes after the end of the prefix (negative: before), with commas.")
    ] = "0,1,2,3,4,5,6,7",
    backtrack: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens taken back before a cut.")
    ] = 3,
    max_paragraphs: MaxMemorized = 40,
    out: Out = Path("memcircuits-cut-prefix"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Cut prefixes at any byte: how much does an audit miss that cuts inside tokens?

    Memorized paragraphs are continued naively, with tokens aligned to the text, and by the mean
    over all tokens that agree with it. Writes cut-prefix.safetensors and cut-prefix.html.

    Example: memcircuits cut-prefix --cuts 0,1,2,3 --max-paragraphs 20
    """
    import memcircuits as mc
    from memcircuits.display.pages import Page

    places = _whole_numbers("--cuts", cuts)
    model, paragraphs = inputs.load()
    memorized = memorized_only(inputs, model, paragraphs)
    result = mc.cut_prefix(
        model,
        draw(memorized, max_paragraphs, seed),
        places,
        backtrack=backtrack,
        progress=inputs.progress,
    )
    page = Page("Prefixes cut at any byte", [result.block()], str(result))
    written = [
        result.save(out / "cut-prefix.safetensors"),
        page.save(out / "cut-prefix.html"),
    ]
    say_written(written, inputs.quiet)
    frame = result.by_place()
    if json:
        Answer(
            "cut-prefix",
            summary=str(result),
            tables={"by_place": frame},
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(f"{result}\nRecited, by the place of the cut; missed: aligned minus naive.")
    shown = ["place", "measure", "n", "cuts", "naive", "aligned", "marginal"]
    print_table(frame[[*shown, "missed", "missed_low", "missed_high"]])
    print_notes(result.notes)


def _whole_numbers(option: str, text: str) -> list[int]:
    """`-1,0,1` as a list."""
    from memcircuits.base.errors import InputError

    try:
        return [int(part) for part in names(text) or ()]
    except ValueError:
        raise InputError(option, repr(text), "write it like 0,1 or -1,0") from None
