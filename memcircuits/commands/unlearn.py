"""`memcircuits unlearn`: cut memorized paragraphs out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pandas import DataFrame

    from memcircuits.edits import Edit
    from memcircuits.evaluation import EditReport
    from memcircuits.paragraphs import Paragraphs
    from memcircuits.unlearning import Recipe

Targets = Annotated[
    int, typer.Option("--targets", min=1, help="At most so many memorized paragraphs, by --seed.")
]
Control = Annotated[
    Path | None, typer.Option(help="File of controls; by default paragraphs with a low EM.")
]
Fraction = Annotated[
    float, typer.Option(help="How many of the candidate weights may change for each paragraph.")
]
Heads = Annotated[
    str | None, typer.Option(help="Only these heads' matrices, for instance L1H2,L0H3.")
]
Layers = Annotated[str | None, typer.Option(help="Only these layers, for instance 0,1.")]
Components = Annotated[
    str | None, typer.Option(help="Only these matrices, for instance W_in,W_out.")
]
KlBudget = Annotated[float, typer.Option(help="KL that held-out controls may show, nats/token.")]
Heldout = Annotated[
    Path | None,
    typer.Option(help="File of texts whose perplexity is measured; the organism has its own."),
]
Export = Annotated[
    Path | None, typer.Option(help="New folder for the edited model, in Hugging Face format.")
]


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

    from memcircuits.checks import one_of
    from memcircuits.evaluation import compare_edits, recovery_curve
    from memcircuits.masks import CHOICES
    from memcircuits.noise import weight_noise
    from memcircuits.unlearning import NATURAL, REFERENCE
    from memcircuits.unlearning import unlearn as find

    recipes = {"natural": NATURAL, "reference": REFERENCE}
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
        for other in CHOICES:
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
    from memcircuits.checks import fraction as check_fraction
    from memcircuits.checks import positive
    from memcircuits.exporting import check_new

    check_fraction("--fraction", fraction)
    positive("--kl-budget", kl_budget)
    if export is not None:
        check_new(export, "--export")


def heldout_text(source: c.Source, model: Any, path: Path | None) -> Paragraphs | None:
    """The texts of --heldout, for the organism its own."""
    from memcircuits.organism import DATA
    from memcircuits.paragraphs import Paragraphs

    if path is None and c.is_shipped(source.model):
        return Paragraphs.read(DATA / "heldout.jsonl", n_prefix=1, n_continuation=99)[:64]
    return None if path is None else source.read(path, model)


def split(
    source: c.Source, model: Any, given: Paragraphs, control: Path | None = None
) -> tuple[Paragraphs, Paragraphs]:
    """The memorized among the given paragraphs, and the controls."""
    from memcircuits.checks import InputError
    from memcircuits.scanning import scan

    found = scan(model, given, progress=not source.quiet)
    if found.memorized is None:
        raise InputError(
            "--paragraphs", f"none of {len(given)} is memorized", "give some that are recited"
        )
    if control is not None:
        return found.memorized, source.read(control, model)
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


def without(paragraphs: Paragraphs, some: Paragraphs) -> Paragraphs | None:
    """The others."""
    taken = set(some.names)
    left = [i for i, name in enumerate(paragraphs.names) if name not in taken]
    return paragraphs[left] if left else None


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
    source: c.Source,
    model: Any,
    found: Edit,
    memorized: Paragraphs,
    control: Paragraphs,
    others: Paragraphs | None,
    heldout: Paragraphs | None,
    out: Path,
    export: Path | None,
    json: bool,
    more: Mapping[str, DataFrame] | None = None,
) -> None:
    """Measure an edit, print it and write it."""
    from memcircuits.evaluation import evaluate_edit

    more = more or {}
    c.say("measuring the edit", source.quiet)
    report: EditReport = evaluate_edit(
        model,
        found,
        memorized,
        control,
        others=others,
        heldout=heldout,
        progress=not source.quiet,
    )
    written = [found.save(out / "edit.safetensors")]
    if export is not None:
        written.append(found.export(export, source.model, revision=source.revision))
    if json:
        c.print_json(
            {
                "summary": str(found),
                "paragraphs": list(memorized.names),
                "stopped": found.stopped,
                "masked": found.n_masked,
                "changed": found.n_changed,
                "candidates": found.n_candidates,
                "norm": found.norm,
                "matrices": c.records(found.to_frame()),
                "steps": c.records(found.steps()),
                "measures": c.records(report.to_frame()),
                **{name: c.records(frame) for name, frame in more.items()},
            }
        )
    else:
        c.print_table(report.to_frame())
        for name, frame in more.items():
            typer.echo(f"\n{name}:")
            c.print_table(frame)
        typer.echo(f"\nedited: {', '.join(memorized.names)}\n{found}\n{report}")
        if found.stopped != "em":
            why = {
                "kl": "another step would have passed --kl-budget; raise it, or --fraction",
                "steps": "the steps ended",
            }
            typer.echo(f"Note: not every target is as was wanted: {why[found.stopped]}.")
    for path in written:
        c.say(f"wrote {path}", source.quiet)
