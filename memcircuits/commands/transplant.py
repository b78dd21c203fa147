"""`memcircuits transplant`: where training wrote a paragraph, against a twin without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from memcircuits.commands.inputs import Inputs, load_twin
from memcircuits.commands.options import Json, Out, Seed, Top, Twin
from memcircuits.commands.output import (
    print_json,
    print_notes,
    print_table,
    records,
    say,
    say_written,
)
from memcircuits.commands.selection import choice, draw, names

_SHOWN = [
    *("unit", "layer", "head", "group", "necessity", "necessity_low", "necessity_high"),
    *("sufficiency", "sufficiency_low", "sufficiency_high", "em_lost", "em_gained"),
]


def transplant(
    inputs: Inputs,
    twin: Twin = None,
    patched: Annotated[str, typer.Option(help="weights or activations.")] = "weights",
    units: Annotated[
        str | None,
        typer.Option(help="head, qk, ov, attn, mlp, neurons, layer, rest, all; by default, all."),
    ] = None,
    max_paragraphs: Annotated[
        int, typer.Option(min=1, help="Maximum number of memorized paragraphs.")
    ] = 40,
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
    from memcircuits.base.errors import InputError
    from memcircuits.display.pages import Page
    from memcircuits.evidence.transplants.results import Patched

    how = choice("--patched", patched, get_args(Patched))
    model, paragraphs = inputs.load()
    memorized = mc.scan(model, paragraphs, progress=inputs.progress).memorized
    if memorized is None:
        raise InputError(
            "--paragraphs", f"none of {len(paragraphs)} is memorized", "give some that are recited"
        )
    chosen = draw(memorized, max_paragraphs, seed)
    say(f"transplanting on {len(chosen)} of {len(memorized)} memorized paragraphs", inputs.quiet)
    result = mc.transplant(
        model,
        load_twin(inputs, twin),
        chosen,
        patched=how,
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
        data = {"patched": patched, "total": result.total, "paragraphs": len(chosen)}
        print_json(data | {"components": records(frame), "notes": list(result.notes)})
        return
    typer.echo(f"{result}; effects of transplanted {patched} in nats/token, and tokens of EM:")
    print_table(frame[_SHOWN].head(top))
    print_notes(result.notes)
