"""`memcircuits report`: write the page of a saved ranking again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.common import naming
from memcircuits.commands.inputs import load, unigram_table
from memcircuits.commands.options import (
    Device,
    Dtype,
    Model,
    Quiet,
    Revision,
    TrustRemoteCode,
    existing,
)
from memcircuits.commands.output import say_written


def report(
    ranking: Annotated[
        Path,
        typer.Argument(help="ranking.safetensors, or the folder that `memcircuits heads` wrote."),
    ] = Path("memcircuits-heads/ranking.safetensors"),
    model: Model = "organism",
    unigrams: Annotated[
        Path | None,
        typer.Option(callback=existing, help="Unigram table (.safetensors) that colours tokens."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="The page; by default, report.html beside the ranking."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of heads with attention maps.")] = 6,
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

    Example: memcircuits report --top 12 --out report.html
    """
    from memcircuits.evidence.ranking import Ranking

    ranking = _file_of(ranking)
    with naming("RANKING", "path"):
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
        heads=top,
        triggers=triggers,
        model=loaded,
        progress=not quiet,
    )
    say_written([page], quiet)


def _file_of(path: Path) -> Path:
    """The ranking itself, where its folder or the file beside it was named."""
    from memcircuits.base.errors import InputError

    if path.is_dir():
        return path / "ranking.safetensors"
    if path.suffix == ".json":
        raise InputError("RANKING", path.name, f"give {path.with_suffix('.safetensors').name}")
    return path
