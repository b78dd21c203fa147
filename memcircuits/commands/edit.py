"""`memcircuits edit`: give memorized prefixes another continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands import unlearn as u


def edit(
    source: c.Source,
    rewritten: Annotated[
        Path | None,
        typer.Option(
            help="File of paragraphs, row by row those of --paragraphs with the wanted "
            "continuations; by default the model's own after the worst perturbation of the prefix."
        ),
    ] = None,
    control: u.Control = None,
    targets: u.Targets = 1,
    fraction: Annotated[
        float, typer.Option(help="How many of the candidate weights may change.")
    ] = 0.001,
    heads: u.Heads = None,
    layers: u.Layers = None,
    components: u.Components = None,
    kl_budget: u.KlBudget = 0.002,
    heldout: u.Heldout = None,
    out: c.Out = Path("memcircuits-edit"),
    export: u.Export = None,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Change few weights so that memorized prefixes go on with another text.

    With --rewritten, all of --paragraphs are edited towards it. Writes edit.safetensors, and with
    --export a model folder.

    Example: memcircuits edit --targets 1 --export rewritten
    """
    from memcircuits.perturbation import perturb_prefix
    from memcircuits.unlearning import edit as find

    u.check_options(fraction, kl_budget, export)
    loaded, given = source.load()
    memorized, controls = u.split(source, loaded, given, control)
    if rewritten is not None:
        chosen, wanted = given, source.read(rewritten, loaded)
    else:
        chosen = u.draw(memorized, targets, seed)
        pairs = perturb_prefix(loaded, chosen, seed=seed, progress=not source.quiet).pairs()
        chosen, wanted = pairs.clean, pairs.corrupted
    found = find(
        loaded,
        chosen,
        wanted,
        controls[::2],
        fraction=fraction,
        heads=u.names(heads),
        layers=u.numbers("--layers", layers),
        components=u.names(components),
        kl_budget=kl_budget,
        seed=seed,
        progress=not source.quiet,
    )
    text = u.heldout_text(source, loaded, heldout)
    others = u.without(memorized, chosen)
    u.finish(source, loaded, found, chosen, controls[1::2], others, text, out, export, json)
