"""`memcircuits gradients`: gradients of the loss for weights or activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, Seed
from memcircuits.commands.output import print_json, print_table, records, say_written
from memcircuits.commands.selection import choice, split

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.evidence.gradients.parameters import ParameterGradients

_ROWS = 10  # printed


@dataclass(frozen=True)
class GradientOptions:
    """What is differentiated, and how the gradients are summarised."""

    objective: Annotated[
        str, typer.Option(help="nll, or contrastive: memorized against controls (equation 3).")
    ] = "nll"
    pool: Annotated[str, typer.Option(help="max, mean or l2 over the weights.")] = "max"
    average: Annotated[
        str,
        typer.Option(help="batch: gradient of the mean loss, or paragraph: mean of the gradients."),
    ] = "batch"
    per_loss: Annotated[
        bool, typer.Option("--per-loss", help="Divide by the loss, to compare sets.")
    ] = False
    activations: Annotated[
        bool,
        typer.Option(
            "--activations", help="Differentiate activations (q, k, v, z, MLP), not weights."
        ),
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder for gradients-SET.safetensors; by default, none."
        ),
    ] = None
    seed: Seed = 0


def gradients(inputs: Inputs, options: GradientOptions, json: Json = False) -> None:
    """Gradients of memorized and control paragraphs per layer, matrix and head.

    Example: memcircuits gradients --average paragraph --per-loss
    """
    choice("--objective", options.objective, ("nll", "contrastive"))
    model, paragraphs = inputs.load()
    memorized, control = split(inputs, model, paragraphs)
    groups = {"memorized": memorized, "control": control}
    if options.activations:
        _report_activations(inputs, model, groups, options.out, json)
        return
    results = _of_weights(inputs, model, groups, options)
    if options.out is not None:
        paths = [
            result.save(options.out / f"gradients-{name}.safetensors")
            for name, result in results.items()
        ]
        say_written(paths, inputs.quiet)
    if json:
        print_json({name: _as_json(result) for name, result in results.items()})
        return
    for name, result in results.items():
        frame = result.to_frame().sort_values("value", ascending=False)
        typer.echo(f"{name}: {result}, loss {result.loss:.4g} nats/token, [{result.units}]")
        print_table(frame.head(_ROWS))


def _of_weights(
    inputs: Inputs, model: Any, groups: Mapping[str, Paragraphs], options: GradientOptions
) -> dict[str, ParameterGradients]:
    import memcircuits as mc

    shared: dict[str, Any] = {"pool": options.pool, "progress": inputs.progress}
    if options.objective == "contrastive":
        memorized, control = groups["memorized"], groups["control"]
        result = mc.contrastive_gradients(model, memorized, control, seed=options.seed, **shared)
        return {"contrastive": result}
    shared |= {"average": options.average, "per_loss": options.per_loss}
    return {name: mc.parameter_gradients(model, group, **shared) for name, group in groups.items()}


def _as_json(result: ParameterGradients) -> dict[str, Any]:
    return {
        "loss": result.loss,
        "units": result.units,
        "layer_share": result.layer_share(),
        "layers": result.layers.tolist(),
        "components": records(result.to_frame()),
    }


def _report_activations(
    inputs: Inputs, model: Any, groups: Mapping[str, Paragraphs], out: Path | None, json: bool
) -> None:
    """The largest gradient over positions of every site, layer and head."""
    import memcircuits as mc

    tables = {}
    for name, group in groups.items():
        result = mc.activation_gradients(model, group, progress=inputs.progress)
        if out is not None:
            say_written([result.save(out / f"activations-{name}.safetensors")], inputs.quiet)
        frame = result.to_frame()
        values = frame.groupby(["site", "layer", "head"], dropna=False, sort=False)["value"]
        tables[name] = frame.loc[values.idxmax()].reset_index(drop=True)
    if json:
        print_json({name: records(table) for name, table in tables.items()})
        return
    for name, table in tables.items():
        typer.echo(f"{name}: |dL/dh| [nats/token per unit], the largest over positions")
        print_table(table.sort_values("value", ascending=False).head(_ROWS))
