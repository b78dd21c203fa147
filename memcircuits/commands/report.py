"""`memcircuits report`: the page of a ranking made before, with more or fewer heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from memcircuits.commands import common as c


def report(
    ranking: Annotated[
        Path, typer.Argument(help="ranking.safetensors, as `memcircuits heads` wrote it.")
    ] = Path("memcircuits-heads/ranking.safetensors"),
    model: c.Model = "organism",
    unigrams: Annotated[
        Path | None, typer.Option(help="Unigram table (.safetensors) that colours tokens.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html beside the ranking.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Heads to show the attention of.")] = 6,
    triggers: Annotated[int, typer.Option(min=0, help="Paragraphs to find trigger tokens of.")] = 3,
    device: c.Device = "auto",
    dtype: c.Dtype = "float32",
    revision: c.Revision = None,
    trust_remote_code: c.TrustRemoteCode = False,
    quiet: c.Quiet = False,
) -> None:
    """Write the report of a saved ranking again; heads are not measured anew.

    Example: memcircuits report --heads 12 --out report.html
    """
    import dataclasses

    from memcircuits.evidence.ranking import Ranking
    from memcircuits.models.loading import DtypeName, load_model

    found = Ranking.load(ranking)
    c.say(f"loading {model}", quiet)
    loaded = load_model(
        model,
        revision=revision,
        device=device,
        dtype=cast(DtypeName, dtype),  # checked by `load_model`
        trust_remote_code=trust_remote_code,
    )
    found = dataclasses.replace(found, unigrams=c.unigrams_for(model, unigrams))
    path = found.to_html(
        ranking.with_name("report.html") if out is None else out,
        heads=heads,
        triggers=triggers,
        model=loaded,
        progress=not quiet,
    )
    c.say(f"wrote {path}", quiet)
