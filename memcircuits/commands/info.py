"""`memcircuits info`: what a model is and what can be done with it."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from memcircuits.commands import common as c


def info(
    model: Annotated[str, typer.Argument(help="Model name, folder or .gguf file.")] = "organism",
    json: c.Json = False,
    device: c.Device = "auto",
    dtype: c.Dtype = "float32",
    revision: c.Revision = None,
    trust_remote_code: c.TrustRemoteCode = False,
    n_prefix: c.Prefix = 50,
    n_continuation: c.Continuation = 50,
    quiet: c.Quiet = False,
) -> None:
    """Check a model and print its architecture, basis, heads and writable sites.

    A model that cannot be analysed is an error that says why.

    Example: memcircuits info EleutherAI/pythia-70m
    """
    from memcircuits.models.loading import DtypeName, load_model
    from memcircuits.models.registry import validate_model

    c.say(f"loading {model}", quiet)
    loaded = load_model(
        model,
        revision=revision,
        device=device,
        dtype=cast(DtypeName, dtype),  # checked by `load_model`
        trust_remote_code=trust_remote_code,
    )
    report = validate_model(loaded)
    facts = report.facts()
    facts[f"{n_prefix} + {n_continuation} fit"] = n_prefix + n_continuation <= report.n_ctx
    if json:
        c.print_json(facts)
        return
    checks, tolerance = facts.pop("checks"), facts.pop("tolerance")
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        typer.echo(f"{name:<21} {'none' if shown is None else shown}")
    typer.echo(f"\nchecks, by how much two ways to the same answer differ (at most {tolerance:g}):")
    for name, difference in checks.items():
        shown = "could not be tried" if difference is None else f"{difference:.1e}"
        typer.echo(f"{name:<21} {shown}")
