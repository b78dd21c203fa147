"""`memcircuits attention`: what heads attend to, and whether it is rare tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import Heads, Json, MaxMemorized, Out, Seed, Top, Unigrams
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import draw, memorized_only, names

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs


def attention(
    inputs: Inputs,
    heads: Heads = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Paragraphs to show, by id or by row from 0, with commas; by default, the first "
            "memorized one."
        ),
    ] = None,
    unigrams: Unigrams = None,
    max_paragraphs: MaxMemorized = 100,
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
    from memcircuits.data.unigrams import COUNTED_HERE
    from memcircuits.models.registry import adapt

    model, paragraphs = inputs.load()
    table = unigram_table(inputs.model, unigrams) or mc.UnigramTable.from_tokens(
        paragraphs.ids, adapt(model).d_vocab, source=COUNTED_HERE
    )
    chosen = None if rows is None else _rows(paragraphs, rows)
    memorized = memorized_only(inputs, model, paragraphs)
    written = []
    for row in chosen or [paragraphs.names.index(memorized.names[0])]:
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
        Answer(
            "attention",
            summary=str(correlation),
            values={"unigrams": table.source},
            tables={"heads": frame},
            notes=(*paragraphs.notes, *correlation.notes),
            files=written,
            provenance=correlation.provenance,
        ).print_json()
        return
    typer.echo(f"tau-b of attention and token counts ({table.source}); negative: rare tokens")
    print_table(frame.head(top))
    print_notes(correlation.notes)


def _rows(paragraphs: Paragraphs, text: str) -> list[int]:
    """The rows that `--rows` names, by id or by number.

    Raises:
        InputError: if there is no such paragraph.
    """
    from memcircuits.base.errors import InputError

    rows = []
    for name in names(text) or ():
        if name in paragraphs.names:
            rows.append(paragraphs.names.index(name))
        elif name.isdecimal() and int(name) < len(paragraphs):
            rows.append(int(name))
        else:
            remedy = f"give an id, or a row from 0 to {len(paragraphs) - 1}"
            raise InputError("--rows", name, remedy)
    return rows
