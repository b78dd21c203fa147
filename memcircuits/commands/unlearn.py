"""`memcircuits unlearn`: cut memorized paragraphs out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c

if TYPE_CHECKING:
    from memcircuits.edits import Edit
    from memcircuits.evaluation import EditReport
    from memcircuits.paragraphs import Paragraphs

Targets = Annotated[
    int, typer.Option("--targets", min=1, help="At most so many memorized paragraphs, by --seed.")
]
Control = Annotated[
    Path | None, typer.Option(help="File of controls; by default paragraphs with a low EM.")
]
Fraction = Annotated[float, typer.Option(help="How many of the candidate weights may change.")]
Heads = Annotated[
    str | None, typer.Option(help="Only these heads' matrices, for instance L1H2,L0H3.")
]
Layers = Annotated[str | None, typer.Option(help="Only these layers, for instance 0,1.")]
Components = Annotated[
    str | None, typer.Option(help="Only these matrices, for instance W_in,W_out.")
]
KlBudget = Annotated[float, typer.Option(help="KL that held-out controls may show, nats/token.")]
Export = Annotated[
    Path | None, typer.Option(help="New folder for the edited model, in Hugging Face format.")
]


def unlearn(
    model: c.Model = "organism",
    paragraphs: c.ParagraphFile = None,
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
    out: c.Out = Path("memcircuits-unlearn"),
    export: Export = None,
    n_prefix: c.Prefix = 50,
    n_continuation: c.Continuation = 50,
    seed: c.Seed = 0,
    json: c.Json = False,
    device: c.Device = "auto",
    dtype: c.Dtype = "float32",
    revision: c.Revision = None,
    trust_remote_code: c.TrustRemoteCode = False,
    quiet: c.Quiet = False,
) -> None:
    """Change few weights so that memorized paragraphs are no longer recited.

    Half of the controls are kept from the optimisation and measured afterwards. Writes
    edit.safetensors, and with --export a model folder.

    Example: memcircuits unlearn --targets 3 --export forgetful
    """
    from memcircuits.checks import one_of
    from memcircuits.unlearning import NATURAL, REFERENCE
    from memcircuits.unlearning import unlearn as find

    recipes = {"natural": NATURAL, "reference": REFERENCE}
    one_of("--recipe", recipe, recipes)
    loaded, given = c.load(
        model,
        paragraphs,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        n_prefix=n_prefix,
        n_continuation=n_continuation,
        quiet=quiet,
    )
    memorized, controls = split(loaded, given, control, quiet=quiet)
    chosen = draw(memorized, targets, seed)
    found = find(
        loaded,
        chosen,
        controls[::2],
        fraction=fraction,
        mask=mask,
        recipe=recipes[recipe],
        heads=names(heads),
        layers=numbers("--layers", layers),
        components=names(components),
        kl_budget=kl_budget,
        seed=seed,
        progress=not quiet,
    )
    finish(loaded, found, chosen, controls[1::2], out, export, model, revision, json, quiet)


def split(
    model: Any, given: Paragraphs, control: Path | None = None, *, quiet: bool
) -> tuple[Paragraphs, Paragraphs]:
    """The memorized among the given paragraphs, and the controls."""
    from memcircuits.checks import InputError
    from memcircuits.paragraphs import Paragraphs
    from memcircuits.scanning import scan

    found = scan(model, given, progress=not quiet)
    if found.memorized is None:
        raise InputError(
            "--paragraphs", f"none of {len(given)} is memorized", "give some that are recited"
        )
    if control is not None:
        lengths = {"n_prefix": given.n_prefix, "n_continuation": given.n_continuation}
        return found.memorized, Paragraphs.read(control, model, **lengths)
    if found.control is None or len(found.control) < 4:
        raise InputError(
            "--control", "not given", "fewer than four of the paragraphs can serve as controls"
        )
    return found.memorized, found.control


def draw(paragraphs: Paragraphs, most: int, seed: int) -> Paragraphs:
    """At most so many paragraphs, in order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(paragraphs), generator=generator)[:most]
    return paragraphs[chosen.sort().values]


def names(text: str | None) -> list[str] | None:
    """`L1H2,L0H3` as a list."""
    return None if text is None else [part.strip() for part in text.split(",")]


def numbers(option: str, text: str | None) -> list[int] | None:
    """`0,1` as a list."""
    from memcircuits.checks import InputError

    parts = names(text)
    if parts is not None and not all(part.isdigit() for part in parts):
        raise InputError(option, repr(text), "write it like 0,1")
    return None if parts is None else [int(part) for part in parts]


def finish(
    model: Any,
    found: Edit,
    memorized: Paragraphs,
    control: Paragraphs,
    out: Path,
    export: Path | None,
    source: str,
    revision: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Measure an edit, print it and write it."""
    from memcircuits.evaluation import evaluate_edit

    report: EditReport = evaluate_edit(model, found, memorized, control, progress=not quiet)
    written = [found.save(out / "edit.safetensors")]
    if export is not None:
        written.append(found.export(export, source, revision=revision))
    if json:
        c.print_json(
            {
                "summary": str(found),
                "stopped": found.stopped,
                "masked": found.n_masked,
                "changed": found.n_changed,
                "candidates": found.n_candidates,
                "norm": found.norm,
                "matrices": c.records(found.to_frame()),
                "steps": c.records(found.steps()),
                "measures": c.records(report.to_frame()),
            }
        )
    else:
        c.print_table(report.to_frame())
        typer.echo(str(found))
        if found.stopped == "steps" and "em_new" not in found.history:
            typer.echo("Note: the steps ended before every target was forgotten.")
    for path in written:
        c.say(f"wrote {path}", quiet)
