"""`memcircuits edit`: give memorized prefixes another continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands.edit_report import finish
from memcircuits.commands.options import (
    Components,
    Control,
    Export,
    Heads,
    Heldout,
    KlBudget,
    Layers,
    Targets,
)
from memcircuits.commands.selection import draw, heldout_text, names, numbers, split, without
from memcircuits.commands.unlearn import check_options


def edit(
    source: c.Source,
    rewritten: Annotated[
        Path | None,
        typer.Option(
            help="File of paragraphs, row by row those of --paragraphs with the wanted "
            "continuations; by default the model's own after the worst perturbation of the prefix."
        ),
    ] = None,
    control: Control = None,
    targets: Targets = 1,
    fraction: Annotated[
        float, typer.Option(help="How many of the candidate weights may change.")
    ] = 0.001,
    heads: Heads = None,
    layers: Layers = None,
    components: Components = None,
    kl_budget: KlBudget = 0.002,
    heldout: Heldout = None,
    out: c.Out = Path("memcircuits-edit"),
    export: Export = None,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Change few weights so that memorized prefixes go on with another text.

    With --rewritten, all of --paragraphs are edited towards it. Writes edit.safetensors, and with
    --export a model folder.

    Example: memcircuits edit --targets 1 --export rewritten
    """
    from memcircuits.editing.unlearning import edit as find
    from memcircuits.evidence.triggers.perturbation import perturb_prefix

    check_options(fraction, kl_budget, export)
    loaded, given = source.load()
    memorized, controls = split(source, loaded, given, control)
    if rewritten is not None:
        chosen, wanted = given, source.read(rewritten, loaded)
    else:
        chosen = draw(memorized, targets, seed)
        pairs = perturb_prefix(loaded, chosen, seed=seed, progress=not source.quiet).pairs()
        chosen, wanted = pairs.clean, pairs.corrupted
    found = find(
        loaded,
        chosen,
        wanted,
        controls[::2],
        fraction=fraction,
        heads=names(heads),
        layers=numbers("--layers", layers),
        components=names(components),
        kl_budget=kl_budget,
        seed=seed,
        progress=not source.quiet,
    )
    text = heldout_text(source, loaded, heldout)
    others = without(memorized, chosen)
    finish(source, loaded, found, chosen, controls[1::2], others, text, out, export, json)
