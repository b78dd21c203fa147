"""`memcircuits unlearn`: make the model forget memorized paragraphs by changing few weights."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memcircuits.commands.inputs import Inputs, load
from memcircuits.commands.options import Json, Out
from memcircuits.commands.output import say
from memcircuits.commands.shared_by_edits import EditOptions, EditTask, report_edit

if TYPE_CHECKING:
    from pandas import DataFrame

    from memcircuits.editing.edit import Edit
    from memcircuits.editing.masks import MaskStrategy
    from memcircuits.editing.recipe import Recipe


def unlearn(
    inputs: Inputs,
    options: EditOptions,
    mask: Annotated[
        Literal["top", "top-per-component", "random", "random-per-tensor", "all"],
        typer.Option(help="Which weights may change; the last three are for comparison."),
    ] = "top",
    recipe: Annotated[
        Literal["deep", "surface", "reference"],
        typer.Option(
            help="deep: forget from every entry; surface: stop the recitation with few weights; "
            "reference: the paper's."
        ),
    ] = "deep",
    twin: Annotated[
        str | None,
        typer.Option(help="For deep: a model that was not trained on the paragraphs."),
    ] = None,
    em_below: Annotated[
        float | None,
        typer.Option(
            help="A target is forgotten, and surface stops, below this EM in tokens; by default, a "
            "tenth of the continuation."
        ),
    ] = None,
    arms: Annotated[
        bool,
        typer.Option("--arms", help="Also edit random masks and all weights, for comparison."),
    ] = False,
    recover: Annotated[
        int,
        typer.Option(min=0, help="Afterwards train on controls for this many steps: relearning."),
    ] = 0,
    noise: Annotated[
        bool, typer.Option("--noise", help="Also measure EM under noise on as many weights.")
    ] = False,
    out: Out = Path("memcircuits-unlearn"),
    json: Json = False,
) -> None:
    """Change weights so that memorized paragraphs are no longer recited.

    By default the model is brought to answer like one that never saw the paragraphs, from their own
    prefixes and from attacked ones. --recipe surface takes several targets one after another until
    the KL passes --kl-budget: set it for all of them together. Half of the controls, and half of
    the memorized paragraphs that are not edited, are to be kept; the other halves are unknown to
    the optimisation and measured afterwards. Writes edit.safetensors, and with --export a model
    folder.

    Example: memcircuits unlearn --targets 3 --export forgetful
    """
    from memcircuits.editing.recipe import DEEP, NATURAL_GRADIENT, STOEHR_2024
    from memcircuits.editing.unlearning import unlearn as find_edit

    recipes = {"deep": DEEP, "surface": NATURAL_GRADIENT, "reference": STOEHR_2024}
    chosen_recipe = recipes[recipe]
    task = EditTask.load(inputs, options)
    reference = None if twin is None else load(twin, inputs.quiet, "--twin", **inputs.loading)
    say(f"editing {len(task.targets)} of {len(task.memorized)} memorized paragraphs", inputs.quiet)
    search = options.search(progress=inputs.progress)

    def make_edit(mask: str, recipe: Recipe) -> Edit:
        arguments: dict[str, Any] = {"mask": mask, "recipe": recipe, "em_below": em_below, **search}
        return find_edit(task.model, task.targets, task.keep, twin=reference, **arguments)

    edit = make_edit(mask, chosen_recipe)
    tables: dict[str, DataFrame] = {}
    if arms:
        edits = {mask: edit} | _edits_of_other_masks(mask, chosen_recipe, make_edit)
        tables["arms"] = _compare(task, edits, inputs)
    if recover:
        tables["recovery"] = _recovery(task, edit, recover, inputs)
    if noise:
        search.pop("kl_budget", None)
        tables["noise"] = _noise(task, mask, search)
    report_edit(edit, task, inputs, out=out, export=options.export, json=json, tables=tables)
    control = f"--control {shlex.quote(str(options.control))} " if options.control else ""
    typed = f"{inputs.typed} {control}".lstrip()
    file = shlex.quote(str(out / "edit.safetensors"))
    say(f"Next: memcircuits audit {typed}--edit {file}", inputs.quiet)


def _edits_of_other_masks(
    mask: str, recipe: Recipe, make_edit: Callable[[str, Recipe], Edit]
) -> dict[str, Edit]:
    """Edits of the same targets with all other choices of weights."""
    from memcircuits.editing.masks import MASK_STRATEGIES

    edits: dict[str, Edit] = {}
    for other in MASK_STRATEGIES:
        used = recipe
        if other == "all" and recipe.curvature == "full":
            # The full curvature of all weights does not fit into memory.
            used = dataclasses.replace(recipe, curvature="diagonal")
        if other != mask:
            edits[other] = make_edit(other, used)
    return edits


def _compare(task: EditTask, edits: dict[str, Edit], inputs: Inputs) -> DataFrame:
    from memcircuits.editing.evaluation import compare_edits

    return compare_edits(
        task.model,
        edits,
        task.targets,
        task.unseen,
        others=task.others,
        heldout=task.heldout,
        progress=inputs.progress,
    ).reset_index()


def _recovery(task: EditTask, edit: Edit, steps: int, inputs: Inputs) -> DataFrame:
    from memcircuits.editing.relearning import recovery_curve

    return recovery_curve(
        task.model, edit, task.targets, task.control, steps=steps, progress=inputs.progress
    ).to_frame()


def _noise(task: EditTask, mask: MaskStrategy, search: dict[str, Any]) -> DataFrame:
    from memcircuits.editing.noise import weight_noise

    return weight_noise(task.model, task.targets, task.unseen, mask=mask, **search).to_frame()
