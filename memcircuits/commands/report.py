"""`memcircuits report`: write the page of a saved ranking again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import load, unigram_table
from memcircuits.commands.options import (
    Device,
    Dtype,
    Model,
    Quiet,
    Revision,
    TrustRemoteCode,
)
from memcircuits.commands.output import say_written


def report(
    ranking: Annotated[
        Path, typer.Argument(help="ranking.safetensors, as `memcircuits heads` wrote it.")
    ] = Path("memcircuits-heads/ranking.safetensors"),
    model: Model = "organism",
    unigrams: Annotated[
        Path | None, typer.Option(help="Unigram table (.safetensors) that colours tokens.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; by default, report.html beside the ranking.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads with attention maps.")] = 6,
    triggers: Annotated[
        int, typer.Option(min=0, help="Number of paragraphs with trigger tokens.")
    ] = 3,
    device: Device = "auto",
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Write the report of a saved ranking again, without measuring the heads again.

    Example: memcircuits report --heads 12 --out report.html
    """
    from memcircuits.evidence.ranking import Ranking

    saved = Ranking.load(ranking)
    loaded = load(
        model,
        quiet,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    saved = dataclasses.replace(saved, unigrams=unigram_table(model, unigrams))
    page = saved.to_html(
        ranking.with_name("report.html") if out is None else out,
        heads=heads,
        triggers=triggers,
        model=loaded,
        progress=not quiet,
    )
    say_written([page], quiet)
