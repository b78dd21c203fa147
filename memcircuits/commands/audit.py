"""`memcircuits audit`: is a text erased, or only hidden?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.common import naming
from memcircuits.commands.inputs import Inputs, load_twin
from memcircuits.commands.options import Control, Json, Out, Seed, Twin
from memcircuits.commands.output import Answer, print_notes, print_table, say, say_written
from memcircuits.commands.selection import (
    draw_targets,
    heldout_text,
    kept_and_unseen,
    split,
    without,
)

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.editing.audits.result import EditAudit
    from memcircuits.editing.edit import Edit

_SHOWN = ["measure", "units", "unedited", "edited", "ci_low", "ci_high", "reference"]


def audit(
    inputs: Inputs,
    edit: Annotated[
        Path, typer.Option(dir_okay=False, help="File of the edit that unlearn wrote.")
    ] = Path("memcircuits-unlearn/edit.safetensors"),
    twin: Twin = None,
    stand_in: Annotated[
        bool,
        typer.Option("--stand-in", help="Use no twin; a stand-in is made of the model itself."),
    ] = False,
    control: Control = None,
    attacks: Annotated[int, typer.Option(min=1, help="Draws of each sort of attacked prefix.")] = 5,
    relearning_steps: Annotated[
        int, typer.Option(min=0, help="Training steps of each relearning curve; 0: none.")
    ] = 5,
    seed: Seed = 0,
    out: Out = Path("memcircuits-audit"),
    json: Json = False,
) -> None:
    """Measure an edit against a model that never saw the text that it removed.

    Attacked prefixes, entries in the middle, rounded weights and training on other text: what
    brings the text back, and how far is the edited model from the twin? Give the same --paragraphs
    and --control as to unlearn; the time grows with the controls. Writes audit.safetensors and
    audit.html.

    Example: memcircuits audit --edit memcircuits-unlearn/edit.safetensors
    """
    import dataclasses

    from memcircuits.base.errors import InputError
    from memcircuits.display.pages import Page
    from memcircuits.editing.audits.audit import audit_edit
    from memcircuits.editing.audits.page import audit_blocks
    from memcircuits.editing.edit import Edit

    if stand_in and twin is not None:
        remedy = "it means that no twin is used: leave out this option or --twin"
        raise InputError("--stand-in", "given with --twin", remedy)
    with naming("--edit", "path"):
        change = Edit.load(edit)
    model, paragraphs = inputs.load()
    memorized, controls = split(inputs, model, paragraphs, control)
    targets = _targets(inputs, change, memorized)
    reference, notes = (None, ()) if stand_in else _reference(inputs, twin, targets)
    say(f"auditing {change} on {len(targets)} paragraphs", inputs.quiet)
    result = audit_edit(
        model,
        change,
        targets,
        controls[1::2],
        reference,
        others=kept_and_unseen(without(memorized, targets))[1],
        heldout=heldout_text(inputs, model, None),
        attacks=attacks,
        relearning_steps=relearning_steps,
        seed=seed,
        progress=inputs.progress,
    )
    result = dataclasses.replace(result, notes=(*notes, *result.notes))
    lead = (
        "The edited model between the unedited one and a reference, the "
        f"{result.reference}: is the text erased, or only hidden?"
    )
    page = Page("Erased, or hidden?", audit_blocks(result, model), lead)
    written = [result.save(out / "audit.safetensors"), page.save(out / "audit.html")]
    say_written(written, inputs.quiet)
    if json:
        _answer(result, written).print_json()
        return
    _print(result)


def _print(result: EditAudit) -> None:
    from memcircuits.editing.audits.verdict import MEANINGS

    print_table(result.to_frame()[_SHOWN])
    typer.echo("depth = 1 - kl_to_reference of the edited / of the unedited model")
    curves = result.relearning_frame()
    if len(curves):
        last = curves[curves["step"] == curves["step"].max()]
        table = last.pivot_table("em", ["trained_on", "step"], "set", sort=False).reset_index()
        typer.echo("\ntokens recited after training:")
        print_table(table)
    typer.echo("\nwhat else changed, before and after the edit:")
    print_table(result.harm_report.to_frame().drop(columns=["units", "n_groups"]))
    typer.echo(f"\n{result}")
    typer.echo(f"{result.verdict} means: {MEANINGS[result.verdict]}.")
    print_notes((*result.reading, *result.notes))


def _reference(
    inputs: Inputs, twin: str | None, targets: Paragraphs
) -> tuple[Any, tuple[str, ...]]:
    """The twin, and notes; none where a shipped model's own twin recites a target as well.

    `audit_edit` refuses a twin that was named and recites a target.
    """
    from memcircuits.editing.audits.audit import recited_by

    model = load_twin(inputs, twin)
    known = [] if twin else recited_by(model, targets)
    if not known:
        return model, ()
    note = (
        f"The model's own twin recites {known[0]} as well: both were trained on it. A stand-in "
        "made of the model itself is the reference."
    )
    return None, (note,)


def _answer(result: EditAudit, written: list[Path]) -> Answer:
    layers = result.layers_frame()
    return Answer(
        "audit",
        summary=str(result),
        values={
            "verdict": result.verdict,
            "ways_back": list(result.ways_back),
            "paragraphs": list(result.names),
            "reference": result.reference,
            "n_attacks": result.n_attacks,
            "reading": list(result.reading),
        },
        tables={
            "measures": result.to_frame(),
            "relearning": result.relearning_frame(),
            "harm": result.harm_report.to_frame(),
            **({} if layers is None else {"layers": layers}),
        },
        notes=result.notes,
        files=written,
        provenance=result.provenance,
    )


def _targets(inputs: Inputs, edit: Edit, memorized: Paragraphs) -> Paragraphs:
    """The memorized paragraphs that the edit was made for, drawn as `unlearn` drew them.

    Raises:
        InputError: if they are not among those given.
    """
    from memcircuits.base.errors import InputError

    made_for = edit.provenance.paragraphs.get("memorized", {})
    n, seed = made_for.get("n", 0) or 1, edit.provenance.options.get("seed", 0)
    targets = draw_targets(inputs, memorized, n, seed)
    if targets.hash != made_for.get("hash"):
        raise InputError(
            "--paragraphs",
            "not those that the edit was made for",
            "give the same model, --paragraphs and lengths as to unlearn",
        )
    return targets
