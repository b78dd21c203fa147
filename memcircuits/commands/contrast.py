"""`memcircuits contrast`: how do recited texts differ from others?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import (
    Control,
    Json,
    MatchNll,
    MaxParagraphs,
    Out,
    Seed,
    Top,
    Unigrams,
)
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import draw, split


def contrast(
    inputs: Inputs,
    control: Control = None,
    max_paragraphs: MaxParagraphs = 60,
    match_nll: MatchNll = False,
    draws: Annotated[int, typer.Option(min=1, help="Resamples and permutations.")] = 1000,
    unigrams: Unigrams = None,
    out: Out = Path("memcircuits-contrast"),
    top: Top = 30,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare recited texts with others: their words, probabilities and hidden states.

    Writes contrast.safetensors and contrast.html. The table shows features that separate the two
    sets best first; q-values count all features.

    Example: memcircuits contrast --max-paragraphs 40
    """
    import memcircuits as mc
    from memcircuits.display.pages import Page

    model, paragraphs = inputs.load()
    memorized, controls = split(inputs, model, paragraphs, control)
    if not match_nll:
        controls = draw(controls, max_paragraphs, seed)
    result = mc.contrast(
        model,
        draw(memorized, max_paragraphs, seed),
        controls,
        unigrams=unigram_table(inputs.model, unigrams),
        match_nll=match_nll,
        draws=draws,
        seed=seed,
        progress=inputs.progress,
    )
    page = Page("Recited texts and others", [result.block()], str(result))
    written = [
        result.save(out / "contrast.safetensors"),
        page.save(out / "contrast.html"),
    ]
    say_written(written, inputs.quiet)
    frame = result.to_frame()
    frame = frame.loc[(frame["auc"] - 0.5).abs().sort_values(ascending=False).index]
    if json:
        Answer(
            "contrast",
            summary=str(result),
            tables={"features": frame},
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(str(result))
    shown = ["feature", "place", "layer", "memorized", "control", "auc", "q_value", "family"]
    print_table(frame[shown].head(top))
    print_notes(result.notes)
