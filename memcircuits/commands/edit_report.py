"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memcircuits.commands import common as c

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pandas import DataFrame

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.editing.edit import Edit
    from memcircuits.editing.edit_report import EditReport


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
    from memcircuits.editing.evaluation import evaluate_edit

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
