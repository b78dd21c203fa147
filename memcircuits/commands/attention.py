"""`memcircuits attention`: what heads attend to, and whether it is rare tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands.selection import draw, names, numbers, split


def attention(
    source: c.Source,
    heads: Annotated[
        str | None, typer.Option(help="Heads to show, for instance L1H2,L0H3; by default all.")
    ] = None,
    shown: Annotated[
        str, typer.Option("--rows", help="Rows of --paragraphs to show, for instance 0,7.")
    ] = "",
    unigrams: Annotated[
        Path | None, typer.Option(help="Unigram table (.safetensors) that defines rarity.")
    ] = None,
    max_paragraphs: Annotated[
        int, typer.Option(min=2, help="Correlate over at most so many memorized paragraphs.")
    ] = 100,
    out: c.Out = Path("memcircuits-attention"),
    top: Annotated[int, typer.Option(min=1, help="Rows of the table printed.")] = 10,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Show attention as interactive pages, and correlate it with the rarity of tokens.

    Writes attention-ROW.html for each row (by default the first memorized paragraph) and
    rare-token-attention.safetensors: the rank correlation (Kendall's tau-b) of attention with token
    counts, negative for heads that look at rare tokens, held against permuted counts.

    Example: memcircuits attention --heads L0H5,L0H3 --rows 0,1
    """
    import memcircuits as mc
    from memcircuits.core.errors import InputError
    from memcircuits.models.registry import adapt

    loaded, given = source.load()
    table = source.unigrams(unigrams) or mc.UnigramTable.from_tokens(
        given.ids, adapt(loaded).d_vocab, source="the given paragraphs"
    )
    memorized, _ = split(source, loaded, given)
    rows = numbers("--rows", shown) if shown else [given.names.index(memorized.names[0])]
    for row in rows or ():
        if row >= len(given):
            raise InputError("--rows", row, f"there are {len(given)} paragraphs, from 0")
        view = mc.attention_view(loaded, given[row], heads=names(heads), unigrams=table)
        path = out / f"attention-{row}.html"
        view.to_html(path)
        c.say(f"wrote {path}", source.quiet)
    rare = mc.rare_token_attention(
        loaded, draw(memorized, max_paragraphs, seed), table, seed=seed, progress=not source.quiet
    )
    c.say(f"wrote {rare.save(out / 'rare-token-attention.safetensors')}", source.quiet)
    frame = rare.to_frame().sort_values("value", ignore_index=True)
    if json:
        c.print_json({"unigrams": table.source, "heads": c.records(frame)})
        return
    typer.echo(f"tau-b of attention and token counts ({table.source}); negative: rare tokens")
    c.print_table(frame.head(top))
