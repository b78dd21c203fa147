"""`memcircuits ablate`: what breaks when each head is removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands.selection import draw, split


def ablate(
    source: c.Source,
    mode: Annotated[str, typer.Option(help="Ablation: zero, mean or resample.")] = "zero",
    max_paragraphs: Annotated[
        int, typer.Option(min=2, help="At most so many memorized paragraphs and so many controls.")
    ] = 100,
    out: c.Out = Path("memcircuits-ablate"),
    top: Annotated[int, typer.Option(min=1, help="Rows of the table printed.")] = 10,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Ablate every head by itself, on memorized paragraphs and on controls.

    The means and samples of the modes mean and resample come from the controls. Writes
    ablation-memorized.safetensors and ablation-control.safetensors (every paragraph is kept) and
    two maps, ablation-memorized.html and ablation-control.html.

    Example: memcircuits ablate --mode mean --max-paragraphs 20
    """
    import memcircuits as mc
    from memcircuits.core.io import write_atomically

    loaded, given = source.load()
    memorized, controls = split(source, loaded, given)
    controls = draw(controls, max_paragraphs, seed)
    found = {
        name: mc.ablate_heads(
            loaded, group, mode=mode, reference=controls, seed=seed, progress=not source.quiet
        )
        for name, group in {
            "memorized": draw(memorized, max_paragraphs, seed),
            "control": controls,
        }.items()
    }
    for name, result in found.items():
        c.say(f"wrote {result.save(out / f'ablation-{name}.safetensors')}", source.quiet)
        page = result.figure().to_html(include_plotlyjs=True)
        c.say(f"wrote {write_atomically(out / f'ablation-{name}.html', page)}", source.quiet)
    frame = found["memorized"].to_frame()[["layer", "head"]]
    for name, result in found.items():
        frame[f"nll_{name}"] = result.values.flatten().tolist()
        frame[f"em_{name}"] = result.measure("em").values.flatten().tolist()
    frame = frame.sort_values("nll_memorized", ascending=False, ignore_index=True)
    if json:
        c.print_json({"mode": mode, "heads": c.records(frame)})
        return
    typer.echo("change of NLL (nats/token) and EM (tokens) without the head")
    c.print_table(frame.head(top))
    for note in found["memorized"].notes:
        typer.echo(f"Note: {note}")
