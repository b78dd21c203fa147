"""`memcircuits counterfactual`: what is remembered, against a model that never saw the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs, load_twin, unigram_table
from memcircuits.commands.options import Json, Out, Top, Twin, Unigrams
from memcircuits.commands.output import Answer, print_notes, print_table, say_written

if TYPE_CHECKING:
    from memcircuits.display.pages import Page
    from memcircuits.evidence.counterfactual_results import Counterfactual

_SHOWN = ("id", "em", "twin_em", "guessable", "known", "remembered", "unexplained", "kind")


def counterfactual(
    inputs: Inputs,
    twin: Twin = None,
    by: Annotated[
        str | None, typer.Option(help="Also print means for each value of this column.")
    ] = None,
    unigrams: Unigrams = None,
    out: Out = Path("memcircuits-counterfactual"),
    top: Top = 10,
    json: Json = False,
) -> None:
    """Split each token into guessable, known to any such model, and remembered, in bits.

    The twin is a model of the same tokenizer that was not trained on the paragraphs. Token counts
    tell what is guessable. Writes counterfactual.safetensors and counterfactual.html, which shows
    the paragraphs with the most remembered bits token by token.

    Example: memcircuits counterfactual --model organism-planted --twin organism --top 4
    """
    import memcircuits as mc

    model, paragraphs = inputs.load()
    result = mc.counterfactual(
        model,
        load_twin(inputs, twin),
        paragraphs,
        ngram=unigram_table(inputs.model, unigrams),
        progress=inputs.progress,
    )
    groups = None if by is None else result.by(by)
    frame = result.to_frame().sort_values("remembered", ascending=False, kind="stable")
    written = [
        result.save(out / "counterfactual.safetensors"),
        _page(result, model, frame.index[:top].tolist()).save(out / "counterfactual.html"),
    ]
    say_written(written, inputs.quiet)
    if json:
        tables = {"paragraphs": frame}
        if groups is not None:
            tables["groups"] = groups
        Answer(
            "counterfactual",
            summary=str(result),
            values={"whole": result.whole},
            tables=tables,
            notes=result.notes,
            files=written,
            provenance=result.provenance,
        ).print_json()
        return
    typer.echo(f"{result}; bits of each continuation:")
    print_table(frame[list(_SHOWN)].head(top))
    if groups is not None:
        typer.echo(f"\nbits/token by {by}:")
        print_table(groups)
    print_notes(result.notes)


def _page(result: Counterfactual, model: Any, rows: list[int]) -> Page:
    """Some paragraphs token by token, as far as the model has a tokenizer, and a table of all."""
    from memcircuits.display.pages import Block, Page, Table
    from memcircuits.models.registry import adapt

    blocks: list[Block] = []
    if adapt(model).tokenizer is not None:
        blocks += [result.block(model, row) for row in rows]
    frame = result.to_frame().sort_values("remembered", ascending=False, kind="stable")
    blocks.append(
        Table(
            frame[list(_SHOWN)],
            title="All paragraphs",
            help={
                "twin_em": "tokens recited by the twin",
                "guessable": "bits of the continuation that an n-gram model knows",
                "known": "bits that the twin knows beyond that",
                "remembered": "bits that only the model knows",
                "unexplained": "bits that the model does not know",
                "kind": "of recited paragraphs: recite (in the training text more than five "
                "times), reconstruct (a template), recollect (rare); unknown without a column of "
                "repetitions",
            },
        )
    )
    lead = (
        "How many bits of each continuation this model knows and its twin does not. Where the twin "
        "was not trained on the text, the model knows them because it saw the text."
    )
    return Page("What is remembered", blocks, lead)
