"""`memcircuits info`: what a model is and which analyses it supports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.base.errors import InputError
from memcircuits.commands.inputs import load
from memcircuits.commands.options import (
    Continuation,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MaxParagraphs,
    Model,
    Prefix,
    Quiet,
    Revision,
    TrustRemoteCode,
)
from memcircuits.commands.output import Answer, print_notes, print_table, say

if TYPE_CHECKING:
    import pandas as pd


def info(
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")
    ] = None,
    model: Model = "organism",
    json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    fold_ln: Annotated[
        bool, typer.Option("--fold-ln", help="Fold norms into the weights, as the paper does.")
    ] = False,
    n_prefix: Prefix = 50,
    n_continuation: Continuation = 50,
    costs: Annotated[
        bool,
        typer.Option("--plan", help="Also time the pieces of each analysis: what would it cost?"),
    ] = False,
    plan_paragraphs: Annotated[
        int | None,
        typer.Option(min=1, help="With --plan: number of paragraphs that are scanned, else 400."),
    ] = None,
    max_paragraphs: MaxParagraphs = 100,
    quiet: Quiet = False,
) -> None:
    """Check a model and print its architecture, weight processing, heads and writable sites.

    Its tokenizer is tried too: against its own tokenizer.json, and by decoding what it encoded.
    A model that cannot be analysed is an error that says why.

    Example: memcircuits info EleutherAI/pythia-70m
    """
    if plan_paragraphs is not None and not costs:
        raise InputError("--plan-paragraphs", plan_paragraphs, "it is for --plan, not given")
    loaded = load(
        model if name is None else name,
        quiet,
        revision=revision,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        fold_ln=fold_ln,
    )
    properties, notes = _examined(loaded, n_prefix, n_continuation)
    frame = None
    if costs:
        from memcircuits.commands.cost_plan import plan
        from memcircuits.models.registry import adapt

        say("timing the pieces of the analyses", quiet)
        frame = plan(
            adapt(loaded),
            n_prefix=n_prefix,
            n_continuation=n_continuation,
            n_paragraphs=plan_paragraphs or 400,
            n_measured=max_paragraphs,
        )
    if json:
        _answer(properties, notes, frame).print_json()
        return
    _print(properties)
    print_notes(notes)
    if frame is not None:
        _print_plan(frame)


def _examined(
    model: Any, n_prefix: int, n_continuation: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the model and its tokenizer are, and what to know about them."""
    from memcircuits.data.token_text import token_labels
    from memcircuits.data.tokenizer_trials import try_tokenizer
    from memcircuits.models.registry import adapt, validate_model
    from memcircuits.results.bos_notes import bos_notes, bos_of_model

    report = validate_model(model)
    properties = report.properties()
    bos = bos_of_model(adapt(model))
    properties["tokens in front"] = token_labels(bos["bos"], model) if bos["bos"] else []
    if model.tokenizer is not None:
        properties |= try_tokenizer(model.tokenizer).properties()
    n_tokens = len(bos["bos"]) + n_prefix + n_continuation
    properties[f"{n_prefix} + {n_continuation} fit"] = n_tokens <= report.n_ctx
    return properties, tuple(bos_notes(bos, {"text": {"bos": bos["bos"]}}))


def _answer(
    properties: dict[str, Any], notes: tuple[str, ...], frame: pd.DataFrame | None
) -> Answer:
    import pandas as pd

    checks = properties.pop("checks")
    return Answer(
        "info",
        summary=f"{properties['model']}: {properties['architecture']}",
        values={_key(name): value for name, value in properties.items()},
        tables={
            "checks": pd.DataFrame(checks.items(), columns=["check", "difference"]),
            **({} if frame is None else {"plan": frame}),
        },
        notes=notes,
    )


def _print_plan(frame: pd.DataFrame) -> None:
    typer.echo("\nwhat analyses would cost; passes are forward passes of one paragraph:")
    print_table(frame)
    typer.echo("mib: memory beyond the weights; unlearn: one round of steps, of at most three")


def _key(name: str) -> str:
    """The name of a property as a key of JSON: `query heads` becomes `query_heads`."""
    return name.replace(" + ", "_").replace(" ", "_").replace("-", "_")


def _print(properties: dict[str, Any]) -> None:
    checks, tolerance = properties.pop("checks"), properties.pop("tolerance")
    for name, value in properties.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or None
        elif isinstance(value, float):
            value = f"{value:.3f} nats/token"
        typer.echo(f"{name:<21} {'none' if value is None else value}")
    typer.echo(f"\nchecks, by how much two ways to the same answer differ (at most {tolerance:g}):")
    for name, difference in checks.items():
        text = "could not be tried" if difference is None else f"{difference:.1e}"
        typer.echo(f"{name:<21} {text}")
