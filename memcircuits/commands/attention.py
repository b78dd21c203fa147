"""`memcircuits attention`: what heads attend to, and whether it is rare tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import Json, Out, Seed, Top, Unigrams
from memcircuits.commands.output import print_json, print_table, records, say_written
from memcircuits.commands.selection import draw, names, numbers, split


def attention(
    inputs: Inputs,
    heads: Annotated[
        str | None,
        typer.Option(help="Heads to show, for instance L1H2,L0H3; by default, all."),
    ] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Rows of --paragraphs to show, for instance 0,7.")
    ] = "",
    unigrams: Unigrams = None,
    max_paragraphs: Annotated[
        int,
        typer.Option(min=2, help="Maximum number of memorized paragraphs in the correlation."),
    ] = 100,
    out: Out = Path("memcircuits-attention"),
    top: Top = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show attention as interactive pages, and correlate it with the rarity of tokens.

    Writes attention-ROW.html for each row (by default, the first memorized paragraph) and
    rare-token-attention.safetensors: the rank correlation (Kendall's tau-b) of attention with token
    counts, negative for heads that attend to rare tokens, compared with permuted counts.

    Example: memcircuits attention --heads L0H5,L0H3 --rows 0,1
    """
    import memcircuits as mc
    from memcircuits.base.errors import InputError
    from memcircuits.data.unigrams import COUNTED_HERE
    from memcircuits.models.registry import adapt

    model, paragraphs = inputs.load()
    table = unigram_table(inputs.model, unigrams) or mc.UnigramTable.from_tokens(
        paragraphs.ids, adapt(model).d_vocab, source=COUNTED_HERE
    )
    memorized, _ = split(inputs, model, paragraphs)
    written = []
    first_memorized = paragraphs.names.index(memorized.names[0])
    for row in (numbers("--rows", rows) or []) if rows else [first_memorized]:
        if row >= len(paragraphs):
            raise InputError("--rows", row, f"there are {len(paragraphs)} paragraphs, from 0")
        view = mc.attention_view(model, paragraphs[row], heads=names(heads), unigrams=table)
        path = out / f"attention-{row}.html"
        view.to_html(path)
        written.append(path)
    correlation = mc.rare_token_attention(
        model, draw(memorized, max_paragraphs, seed), table, seed=seed, progress=inputs.progress
    )
    written.append(correlation.save(out / "rare-token-attention.safetensors"))
    say_written(written, inputs.quiet)
    frame = correlation.to_frame().sort_values("value", ignore_index=True)
    if json:
        print_json({"unigrams": table.source, "heads": records(frame)})
        return
    typer.echo(f"tau-b of attention and token counts ({table.source}); negative: rare tokens")
    print_table(frame.head(top))
