"""`memcircuits ablate`: the effect of removing each head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, Out, Seed, Top
from memcircuits.commands.output import (
    print_json,
    print_notes,
    print_table,
    records,
    say_written,
)
from memcircuits.commands.selection import choice, draw, split


def ablate(
    inputs: Inputs,
    mode: Annotated[str, typer.Option(help="Ablation: zero, mean or resample.")] = "zero",
    max_paragraphs: Annotated[
        int, typer.Option(min=2, help="Maximum number of memorized paragraphs, and of controls.")
    ] = 100,
    out: Out = Path("memcircuits-ablate"),
    top: Top = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Ablate every head by itself, on memorized paragraphs and on controls.

    The means and samples of the modes mean and resample are taken from the controls. Writes
    ablation-memorized.safetensors and ablation-control.safetensors (with the values of every
    paragraph) and two maps, ablation-memorized.html and ablation-control.html.

    Example: memcircuits ablate --mode mean --max-paragraphs 20
    """
    import memcircuits as mc
    from memcircuits.base.io import write_atomically
    from memcircuits.evidence.ablation import Mode

    checked_mode = choice("--mode", mode, get_args(Mode))
    model, paragraphs = inputs.load()
    memorized, control = split(inputs, model, paragraphs)
    groups = {
        "memorized": draw(memorized, max_paragraphs, seed),
        "control": draw(control, max_paragraphs, seed),
    }
    effects = {
        name: mc.ablate_heads(
            model,
            group,
            mode=checked_mode,
            reference=groups["control"],
            seed=seed,
            progress=inputs.progress,
        )
        for name, group in groups.items()
    }
    written = []
    for name, effect in effects.items():
        written.append(effect.save(out / f"ablation-{name}.safetensors"))
        page = effect.figure().to_html(include_plotlyjs=True)
        written.append(write_atomically(out / f"ablation-{name}.html", page))
    say_written(written, inputs.quiet)

    frame = effects["memorized"].to_frame()[["layer", "head"]]
    for name, effect in effects.items():
        frame[f"nll_{name}"] = effect.values.flatten().tolist()
        frame[f"em_{name}"] = effect.measure("em").values.flatten().tolist()
    frame = frame.sort_values("nll_memorized", ascending=False, ignore_index=True)
    if json:
        print_json({"mode": mode, "heads": records(frame)})
        return
    typer.echo("change of NLL (nats/token) and EM (tokens) without the head")
    print_table(frame.head(top))
    print_notes(effects["memorized"].notes)
