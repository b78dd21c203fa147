"""`memcircuits gradients`: where the weights hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs


def gradients(
    source: c.Source,
    objective: Annotated[
        str, typer.Option(help="nll, or contrastive: memorized against controls (equation 3).")
    ] = "nll",
    pool: Annotated[str, typer.Option(help="max, mean or l2 over the weights.")] = "max",
    average: Annotated[
        str, typer.Option(help="batch (gradient of the mean loss) or paragraph (mean of each's).")
    ] = "batch",
    per_loss: Annotated[
        bool, typer.Option("--per-loss", help="Divide by the loss, to compare sets.")
    ] = False,
    activations: Annotated[
        bool,
        typer.Option("--activations", help="Of activations (q, k, v, z, MLP) in place of weights."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for gradients-SET.safetensors; by default none.")
    ] = None,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Gradients of memorized and control paragraphs per layer, matrix and head.

    Example: memcircuits gradients --average paragraph --per-loss
    """
    import memcircuits as mc
    from memcircuits.commands.selection import split
    from memcircuits.core.errors import one_of

    one_of("--objective", objective, ("nll", "contrastive"))
    loaded, given = source.load()
    memorized, control = split(source, loaded, given)
    if activations:
        _activations(source, loaded, {"memorized": memorized, "control": control}, out, json)
        return
    if objective == "contrastive":
        results = {
            "contrastive": mc.contrastive_gradients(
                loaded, memorized, control, pool=pool, seed=seed, progress=not source.quiet
            )
        }
    else:
        results = {
            name: mc.parameter_gradients(
                loaded,
                group,
                pool=pool,
                average=average,
                per_loss=per_loss,
                progress=not source.quiet,
            )
            for name, group in {"memorized": memorized, "control": control}.items()
        }
    if out is not None:
        for name, result in results.items():
            c.say(f"wrote {result.save(out / f'gradients-{name}.safetensors')}", source.quiet)
    if json:
        c.print_json(
            {
                name: {
                    "loss": result.loss,
                    "units": result.units,
                    "layer_share": result.layer_share(),
                    "layers": result.layers.tolist(),
                    "components": c.records(result.to_frame()),
                }
                for name, result in results.items()
            }
        )
        return
    for name, result in results.items():
        frame = result.to_frame().sort_values("value", ascending=False)
        typer.echo(f"{name}: {result}, loss {result.loss:.4g} nats/token, [{result.units}]")
        c.print_table(frame.head(10))


def _activations(
    source: c.Source,
    model: Any,
    groups: Mapping[str, Paragraphs],
    out: Path | None,
    json: bool,
) -> None:
    """Largest gradient over positions of every site, layer and head."""
    import memcircuits as mc

    tables = {}
    for name, group in groups.items():
        found = mc.activation_gradients(model, group, progress=not source.quiet)
        if out is not None:
            c.say(f"wrote {found.save(out / f'activations-{name}.safetensors')}", source.quiet)
        frame = found.to_frame()
        places = frame.groupby(["site", "layer", "head"], dropna=False, sort=False)["value"]
        tables[name] = frame.loc[places.idxmax()].reset_index(drop=True)
    if json:
        c.print_json({name: c.records(table) for name, table in tables.items()})
        return
    for name, table in tables.items():
        typer.echo(f"{name}: |dL/dh| [nats/token per unit], the largest over positions")
        c.print_table(table.sort_values("value", ascending=False).head(10))
