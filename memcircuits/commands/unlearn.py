"""`memcircuits unlearn`: cut memorized paragraphs out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c
from memcircuits.commands.edit_report import finish
from memcircuits.commands.options import (
    Components,
    Control,
    Export,
    Fraction,
    Heads,
    Heldout,
    KlBudget,
    Layers,
    Targets,
)
from memcircuits.commands.selection import draw, heldout_text, names, numbers, split, without

if TYPE_CHECKING:
    from pandas import DataFrame

    from memcircuits.editing.edit import Edit
    from memcircuits.editing.recipe import Recipe


def unlearn(
    source: c.Source,
    control: Control = None,
    targets: Targets = 1,
    fraction: Fraction = 0.001,
    mask: Annotated[
        str, typer.Option(help="top, or to compare random, random-per-tensor, all.")
    ] = "top",
    recipe: Annotated[str, typer.Option(help="natural or reference (the paper's).")] = "natural",
    heads: Heads = None,
    layers: Layers = None,
    components: Components = None,
    kl_budget: KlBudget = 0.002,
    em_below: Annotated[
        float | None,
        typer.Option(
            help="Stop when every target is recited for fewer tokens; by default a tenth."
        ),
    ] = None,
    arms: Annotated[
        bool, typer.Option("--arms", help="Edit also random masks and all weights, to compare.")
    ] = False,
    recover: Annotated[
        int,
        typer.Option(min=0, help="Then train so many steps on controls: does it come back?"),
    ] = 0,
    noise: Annotated[
        bool, typer.Option("--noise", help="Measure EM also under noise on as many weights.")
    ] = False,
    heldout: Heldout = None,
    out: c.Out = Path("memcircuits-unlearn"),
    export: Export = None,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Change few weights so that memorized paragraphs are no longer recited.

    Several targets are taken one after another, until the KL passes --kl-budget: give it for all
    of them. On the organism the first takes two minutes of one core, and each further one twenty
    seconds.
    Half of the controls are kept from the optimisation and measured afterwards. Writes
    edit.safetensors, and with --export a model folder.

    Example: memcircuits unlearn --targets 3 --kl-budget 0.006 --export forgetful
    """
    from dataclasses import replace

    from memcircuits.core.errors import one_of
    from memcircuits.editing.evaluation import compare_edits
    from memcircuits.editing.masks import MASK_STRATEGIES
    from memcircuits.editing.noise import weight_noise
    from memcircuits.editing.recipe import NATURAL_GRADIENT, STOEHR_2024
    from memcircuits.editing.relearning import recovery_curve
    from memcircuits.editing.unlearning import unlearn as find

    recipes = {"natural": NATURAL_GRADIENT, "reference": STOEHR_2024}
    one_of("--recipe", recipe, recipes)
    check_options(fraction, kl_budget, export)
    loaded, given = source.load()
    memorized, controls = split(source, loaded, given, control)
    chosen = draw(memorized, targets, seed)
    c.say(f"editing {len(chosen)} of {len(memorized)} memorized paragraphs", source.quiet)
    where: dict[str, Any] = {
        "heads": names(heads),
        "layers": numbers("--layers", layers),
        "components": names(components),
        "seed": seed,
        "progress": not source.quiet,
    }

    def make(mask: str, used: Recipe) -> Edit:
        return find(
            loaded,
            chosen,
            controls[::2],
            fraction=fraction,
            mask=mask,
            recipe=used,
            em_below=em_below,
            kl_budget=kl_budget,
            **where,
        )

    found = make(mask, recipes[recipe])
    unseen, others = controls[1::2], without(memorized, chosen)
    text = heldout_text(source, loaded, heldout)
    more: dict[str, DataFrame] = {}
    if arms:
        edits = {mask: found}
        for other in MASK_STRATEGIES:
            used = recipes[recipe]
            if other == "all" and used.curvature == "full":
                used = replace(used, curvature="diagonal")  # of all together it fits nowhere
            if other != mask:
                edits[other] = make(other, used)
        more["arms"] = compare_edits(
            loaded,
            edits,
            chosen,
            unseen,
            others=others,
            heldout=text,
            progress=not source.quiet,
        ).reset_index()
    if recover:
        more["recovery"] = recovery_curve(
            loaded, found, chosen, controls[::2], steps=recover, progress=not source.quiet
        ).to_frame()
    if noise:
        more["noise"] = weight_noise(
            loaded, chosen, unseen, fraction=fraction, mask=mask, **where
        ).to_frame()
    finish(source, loaded, found, chosen, unseen, others, text, out, export, json, more=more)


def check_options(fraction: float, kl_budget: float, export: Path | None) -> None:
    """What can be refused before anything is loaded."""
    from memcircuits.core.errors import fraction as check_fraction
    from memcircuits.core.errors import positive
    from memcircuits.editing.export import check_new

    check_fraction("--fraction", fraction)
    positive("--kl-budget", kl_budget)
    if export is not None:
        check_new(export, "--export")
