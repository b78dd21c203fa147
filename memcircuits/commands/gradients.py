"""`memcircuits gradients`: gradients of the loss for weights or activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Control, Json, Out, Seed, Top
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import draw, split

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.display.pages import Page
    from memcircuits.evidence.gradients.activations import ActivationGradients
    from memcircuits.evidence.gradients.parameters import ParameterGradients


@dataclass(frozen=True)
class GradientOptions:
    """What is differentiated, and how the gradients are summarised."""

    control: Control = None
    objective: Annotated[
        Literal["nll", "contrastive"],
        typer.Option(help="contrastive: memorized against controls (equation 3)."),
    ] = "nll"
    pool: Annotated[
        Literal["max", "mean", "l2"], typer.Option(help="How the weights of a matrix are pooled.")
    ] = "max"
    average: Annotated[
        Literal["batch", "paragraph"],
        typer.Option(help="Gradient of the mean loss, or mean of the gradients."),
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
    max_paragraphs: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum number of memorized paragraphs, and of controls, by --seed; by default, "
            "all.",
        ),
    ] = None
    seed: Seed = 0


def gradients(
    inputs: Inputs,
    options: GradientOptions,
    out: Out = Path("memcircuits-gradients"),
    top: Top = 10,
    json: Json = False,
) -> None:
    """Gradients of memorized and control paragraphs per layer, matrix and head.

    Writes gradients.html and, for each set, gradients-SET.safetensors (or activations-SET).

    Example: memcircuits gradients --average paragraph --per-loss
    """
    model, paragraphs = inputs.load()
    memorized, control = split(inputs, model, paragraphs, options.control)
    n = options.max_paragraphs
    if n is not None:
        memorized, control = draw(memorized, n, options.seed), draw(control, n, options.seed)
    groups = {"memorized": memorized, "control": control}
    of_activations = _of_activations(inputs, model, groups) if options.activations else {}
    of_weights = {} if options.activations else _of_weights(inputs, model, groups, options)
    results: Mapping[str, ActivationGradients | ParameterGradients] = {
        **of_activations,
        **of_weights,
    }
    kind = "activations" if options.activations else "gradients"
    written = [result.save(out / f"{kind}-{name}.safetensors") for name, result in results.items()]
    if of_weights:
        written.append(_page(of_weights).save(out / "gradients.html"))
    tables = {name: _largest_over_positions(result) for name, result in of_activations.items()}
    tables |= {name: result.to_frame() for name, result in of_weights.items()}
    tables = {
        name: frame.sort_values("value", ascending=False, kind="stable")
        for name, frame in tables.items()
    }
    notes = dict.fromkeys(note for result in results.values() for note in result.notes)
    if json:
        Answer(
            "gradients",
            summary=f"gradients on {len(memorized)} memorized paragraphs, {len(control)} controls",
            values={name: _values(result) for name, result in of_weights.items()},
            tables=tables,
            notes=(*paragraphs.notes, *notes),
            files=written,
            provenance=next(iter(results.values())).provenance,
        ).print_json()
    else:
        _print(tables, of_weights, top)
        print_notes(notes)
    say_written(written, inputs.quiet)


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


def _page(results: Mapping[str, ParameterGradients]) -> Page:
    """A map of layers and matrices for each set."""
    import torch

    from memcircuits.display.pages import Heatmap, Page

    maps = [
        Heatmap(
            torch.stack([of_heads.amax(1) for of_heads in result.values.values()], 1),
            name="gradient, the largest over heads",
            units=result.units,
            col_label="matrix",
            col_names=list(result.values),
            title=f"{name}: {result}, loss {result.loss:.4g} nats/token",
        )
        for name, result in results.items()
    ]
    lead = (
        "Gradients say where a small step would change the loss, not where a text is stored. "
        "Without --per-loss, a set with a smaller loss has smaller gradients for that reason alone."
    )
    return Page("Gradients of the loss", maps, lead)


def _of_activations(
    inputs: Inputs, model: Any, groups: Mapping[str, Paragraphs]
) -> dict[str, ActivationGradients]:
    import memcircuits as mc

    return {
        name: mc.activation_gradients(model, group, progress=inputs.progress)
        for name, group in groups.items()
    }


def _largest_over_positions(result: ActivationGradients) -> pd.DataFrame:
    """The largest gradient of every site, layer and head, and its position."""
    frame = result.to_frame()
    values = frame.groupby(["site", "layer", "head"], dropna=False, sort=False)["value"]
    return frame.loc[values.idxmax()].reset_index(drop=True)


def _values(result: ParameterGradients) -> dict[str, Any]:
    return {
        "loss": result.loss,
        "units": result.units,
        "lower_half_share": result.layer_share(),
        "layers": result.layers.tolist(),
    }


def _print(
    tables: Mapping[str, pd.DataFrame], of_weights: Mapping[str, ParameterGradients], top: int
) -> None:
    for name, table in tables.items():
        if name in of_weights:
            result = of_weights[name]
            typer.echo(f"{name}: {result}, loss {result.loss:.4g} nats/token, [{result.units}]")
        else:
            typer.echo(f"{name}: |dL/dh| [nats/token per unit], the largest over positions")
        # The pooled value by the chosen pool is `value`; a column that repeats it is left out.
        same = [c for c in table if c != "value" and table[c].equals(table["value"])]
        print_table(table.drop(columns=same).head(top))
