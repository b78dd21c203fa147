"""`memcircuits transplant`: where training wrote a paragraph, against a twin without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from memcircuits.commands.inputs import Inputs, load_twin
from memcircuits.commands.options import Json, MaxMemorized, Out, Seed, Top, Twin
from memcircuits.commands.output import Answer, print_notes, print_table, say, say_written
from memcircuits.commands.selection import draw, memorized_only, names

_SHOWN = [
    *("unit", "layer", "head", "group", "necessity", "necessity_low", "necessity_high"),
    *("sufficiency", "sufficiency_low", "sufficiency_high", "em_lost", "em_gained"),
]


def transplant(
    inputs: Inputs,
    twin: Twin = None,
    patched: Annotated[
        Literal["weights", "activations"], typer.Option(help="What is exchanged.")
    ] = "weights",
    units: Annotated[
        str | None,
        typer.Option(help="head, qk, ov, attn, mlp, neurons, layer, rest, all; by default, all."),
    ] = None,
    max_paragraphs: MaxMemorized = 40,
    out: Out = Path("memcircuits-transplant"),
    top: Top = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Put each component of the model into its twin and back, one at a time.

    The twin was trained like the model, but not on the paragraphs. Necessity is how much the
    model's loss on those that it recites in full rises with the twin's component, sufficiency how
    much the twin's loss falls with the model's component. Writes transplant.safetensors (with the
    values of every paragraph) and transplant.html.

    Example: memcircuits transplant --model organism-planted --twin organism --units head,mlp,layer
    """
    import memcircuits as mc
    from memcircuits.display.pages import Page

    model, paragraphs = inputs.load()
    memorized = memorized_only(inputs, model, paragraphs)
    chosen = draw(memorized, max_paragraphs, seed)
    say(f"transplanting on {len(chosen)} of {len(memorized)} memorized paragraphs", inputs.quiet)
    result = mc.transplant(
        model,
        load_twin(inputs, twin),
        chosen,
        patched=patched,
        units=names(units),  # type: ignore[arg-type]
        progress=inputs.progress,
    )
    lead = (
        "What this model remembers of the paragraphs, and which of its components hold it: each "
        "one was exchanged, by itself, between the model and a twin not trained on them."
    )
    page = Page("Where the memory was written", result.blocks(), lead)
    written = [result.save(out / "transplant.safetensors"), page.save(out / "transplant.html")]
    say_written(written, inputs.quiet)
    frame = result.to_frame(seed=seed).sort_values("necessity", ascending=False, kind="stable")
    if json:
        Answer(
            "transplant",
            summary=str(result),
            values={"patched": patched, "total": result.total, "n_paragraphs": len(chosen)},
            tables={"components": frame},
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(f"{result}; effects of transplanted {patched} in nats/token, and tokens of EM:")
    print_table(frame[_SHOWN].head(top))
    print_notes(result.notes)
