"""What `unlearn` and `edit` share: options, the paragraphs of an edit, and the report about it.

Controls are split in two: every second one is given to the search, the others are never seen by it
and tell what the edit changed. Further memorized paragraphs tell whether it is specific.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Components, Control, Export, Seed
from memcircuits.commands.output import print_json, print_table, records, say, say_written
from memcircuits.commands.selection import draw, heldout_text, names, numbers, split, without

if TYPE_CHECKING:
    from pandas import DataFrame

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.editing.edit import Edit
    from memcircuits.editing.edit_report import EditReport

_STOPPED = {
    "kl": "another step would have passed --kl-budget; raise it, or --fraction",
    "steps": "the maximum number of steps was reached",
}


@dataclass(frozen=True)
class EditOptions:
    """The options that `unlearn` and `edit` share."""

    control: Control = None
    targets: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of memorized paragraphs to edit, by --seed."),
    ] = 1
    fraction: Annotated[
        float,
        typer.Option(help="Fraction of the candidate weights that may change per paragraph."),
    ] = 0.001
    heads: Annotated[
        str | None, typer.Option(help="Use only these heads' matrices, for instance L1H2,L0H3.")
    ] = None
    layers: Annotated[str | None, typer.Option(help="Use only these layers, for instance 0,1.")] = (
        None
    )
    components: Components = None
    kl_budget: Annotated[
        float, typer.Option(help="Maximum KL on held-out controls, nats/token.")
    ] = 0.002
    heldout: Annotated[
        Path | None,
        typer.Option(help="File of texts to measure perplexity on; the organism has its own."),
    ] = None
    export: Export = None
    seed: Seed = 0

    def check(self) -> None:
        """Raise `InputError` for what can be refused before a model is loaded."""
        from memcircuits.base.errors import fraction, positive
        from memcircuits.editing.export import check_new

        fraction("--fraction", self.fraction)
        positive("--kl-budget", self.kl_budget)
        if self.export is not None:
            check_new(self.export, "--export")

    def search(self, *, progress: bool) -> dict[str, Any]:
        """The arguments that say which weights are searched, and how."""
        return {
            "fraction": self.fraction,
            "heads": names(self.heads),
            "layers": numbers("--layers", self.layers),
            "components": names(self.components),
            "seed": self.seed,
            "progress": progress,
        }


@dataclass(frozen=True)
class EditTask:
    """The model and the paragraphs of an edit.

    Attributes:
        model: the model.
        paragraphs: all paragraphs given.
        memorized: those that are memorized.
        targets: the memorized paragraphs to edit, drawn by the seed.
        control: the controls that the search is given.
        unseen: the controls that only the evaluation is given.
        heldout: texts to measure perplexity on.
    """

    model: Any
    paragraphs: Paragraphs
    memorized: Paragraphs
    targets: Paragraphs
    control: Paragraphs
    unseen: Paragraphs
    heldout: Paragraphs | None

    @classmethod
    def load(cls, inputs: Inputs, options: EditOptions) -> EditTask:
        """Check the options, load the model, and choose the paragraphs."""
        options.check()
        model, paragraphs = inputs.load()
        memorized, control = split(inputs, model, paragraphs, options.control)
        return cls(
            model=model,
            paragraphs=paragraphs,
            memorized=memorized,
            targets=draw(memorized, options.targets, options.seed),
            control=control[::2],
            unseen=control[1::2],
            heldout=heldout_text(inputs, model, options.heldout),
        )

    @property
    def others(self) -> Paragraphs | None:
        """The memorized paragraphs that are not edited."""
        return without(self.memorized, self.targets)

    def evaluate(self, edit: Edit, *, progress: bool) -> EditReport:
        """Measure an edit on the targets and on everything that should not change."""
        from memcircuits.editing.evaluation import evaluate_edit

        return evaluate_edit(
            self.model,
            edit,
            self.targets,
            self.unseen,
            others=self.others,
            heldout=self.heldout,
            progress=progress,
        )


def report_edit(
    edit: Edit,
    task: EditTask,
    inputs: Inputs,
    *,
    out: Path,
    export: Path | None,
    json: bool,
    tables: Mapping[str, DataFrame] | None = None,
) -> None:
    """Measure an edit, write it, and print the measures and further tables."""
    say("measuring the edit", inputs.quiet)
    report = task.evaluate(edit, progress=inputs.progress)
    written = [edit.save(out / "edit.safetensors")]
    if export is not None:
        written.append(edit.export(export, inputs.model, revision=inputs.revision))
    if json:
        print_json(_as_json(edit, task, report, tables or {}))
    else:
        _print(edit, task, report, tables or {})
    say_written(written, inputs.quiet)


def _as_json(
    edit: Edit, task: EditTask, report: EditReport, tables: Mapping[str, DataFrame]
) -> dict[str, Any]:
    return {
        "summary": str(edit),
        "paragraphs": list(task.targets.names),
        "stopped": edit.stopped,
        "masked": edit.n_masked,
        "changed": edit.n_changed,
        "candidates": edit.n_candidates,
        "norm": edit.norm,
        "matrices": records(edit.to_frame()),
        "steps": records(edit.steps()),
        "measures": records(report.to_frame()),
        **{name: records(frame) for name, frame in tables.items()},
    }


def _print(edit: Edit, task: EditTask, report: EditReport, tables: Mapping[str, DataFrame]) -> None:
    print_table(report.to_frame())
    for name, frame in tables.items():
        typer.echo(f"\n{name}:")
        print_table(frame)
    typer.echo(f"\nedited: {', '.join(task.targets.names)}\n{edit}\n{report}")
    if edit.stopped != "em":
        typer.echo(f"Note: not every target reached its goal: {_STOPPED[edit.stopped]}.")
