"""What `unlearn` and `edit` share: options, the paragraphs of an edit, and the report about it.

Controls are split in two: every second one is given to the search, the others are never seen by it
and tell what the edit changed. So are the memorized paragraphs that are not edited: the search
keeps one half, and the other half tells whether the edit is specific.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Components, Control, Export, Heads, Seed, existing
from memcircuits.commands.output import (
    PIPED_WIDTH,
    Answer,
    print_notes,
    print_table,
    say,
    say_written,
)
from memcircuits.commands.selection import (
    draw_targets,
    heldout_text,
    kept_and_unseen,
    names,
    numbers,
    split,
    without,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.editing.edit import Edit
    from memcircuits.editing.edit_report import EditReport

_STOPPED = {
    "kl": "another step would have passed --kl-budget; raise it, or --fraction",
    "steps": "the maximum number of steps was reached",
}
_HARM = (
    "memorized: what was to go; others: recitations that are to stay; control, own text: what the "
    "unedited model writes behind a control's prefix. Its em are the tokens that the edited model "
    "writes as well before the first that differs, and a small change can make that one early; "
    "its kl says how large the change is."
)


@dataclass(frozen=True)
class EditOptions:
    """The options that `unlearn` and `edit` share."""

    control: Control = None
    targets: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of memorized paragraphs to edit, by --seed."),
    ] = 1
    fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the candidate weights that may change (per paragraph, if one by "
            "one); by default 0.001, and of deep unlearning 1."
        ),
    ] = None
    heads: Heads = None
    layers: Annotated[str | None, typer.Option(help="Use only these layers, for instance 0,1.")] = (
        None
    )
    components: Components = None
    kl_budget: Annotated[
        float | None,
        typer.Option(
            help="Maximum KL on held-out controls, nats/token; by default 0.002, and no limit for "
            "deep unlearning."
        ),
    ] = None
    heldout: Annotated[
        Path | None,
        typer.Option(
            callback=existing,
            help="File of texts to measure perplexity on; the organism has its own.",
        ),
    ] = None
    export: Export = None
    seed: Seed = 0

    def check(self) -> None:
        """Raise `InputError` for what can be refused before a model is loaded."""
        from memcircuits.base.errors import fraction, positive
        from memcircuits.editing.export import check_new

        numbers("--layers", self.layers)
        if self.fraction is not None:
            fraction("--fraction", self.fraction)
        if self.kl_budget is not None:
            positive("--kl-budget", self.kl_budget)
        if self.export is not None:
            check_new(self.export, "--export")

    def check_weights(self, model: Any) -> None:
        """Raise `InputError` if the model lacks the heads, layers or components asked for."""
        from memcircuits.editing.masks import Candidates
        from memcircuits.models.registry import adapt

        Candidates.of(
            adapt(model),
            heads=names(self.heads),
            layers=numbers("--layers", self.layers),
            components=names(self.components),
        )

    def search(self, *, progress: bool) -> dict[str, Any]:
        """The arguments that say which weights are searched, and how."""
        given = {"fraction": self.fraction, "kl_budget": self.kl_budget}
        return {name: value for name, value in given.items() if value is not None} | {
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
        keep: what the search is to keep, controls and memorized paragraphs that are not edited.
        control: the controls among them.
        unseen: the controls that only the evaluation is given.
        others: the memorized paragraphs that only the evaluation is given; None: there are none.
        heldout: texts to measure perplexity on.
    """

    model: Any
    paragraphs: Paragraphs
    memorized: Paragraphs
    targets: Paragraphs
    keep: Paragraphs
    control: Paragraphs
    unseen: Paragraphs
    others: Paragraphs | None
    heldout: Paragraphs | None

    @classmethod
    def load(cls, inputs: Inputs, options: EditOptions, *, paired: bool = False) -> EditTask:
        """Check the options, load the model, and choose the paragraphs.

        If another file is `paired` with the paragraphs, no row of them is skipped.
        """
        options.check()
        model, paragraphs = inputs.load(paired=paired)
        options.check_weights(model)
        memorized, control = split(inputs, model, paragraphs, options.control)
        if not paired and len(memorized) < options.targets and options.targets > 1:
            typer.echo(
                f"--targets {options.targets}: only {len(memorized)} paragraphs are memorized, and "
                "all of them are edited",
                err=True,
            )
        targets = draw_targets(inputs, memorized, options.targets, options.seed)
        kept, others = kept_and_unseen(without(memorized, targets))
        return cls(
            model=model,
            paragraphs=paragraphs,
            memorized=memorized,
            targets=targets,
            keep=control[::2] if kept is None else control[::2] + kept,
            control=control[::2],
            unseen=control[1::2],
            others=others,
            heldout=heldout_text(inputs, model, options.heldout),
        )

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
    wanted: Paragraphs | None = None,
) -> None:
    """Measure an edit, write it, and print its measures, what the model writes, further tables.

    Args:
        edit: the edit.
        task: its model and paragraphs.
        inputs: the options of the command.
        out: folder for `edit.safetensors`.
        export: new folder for the edited model; None for none.
        json: print JSON.
        tables: further tables, by name.
        wanted: the targets with the continuations that were asked for.
    """
    say("measuring the edit", inputs.quiet)
    report = task.evaluate(edit, progress=inputs.progress)
    texts = _texts(edit, task, wanted)
    written = [edit.save(out / "edit.safetensors")]
    if export is not None:
        written.append(edit.export(export, inputs.model, revision=inputs.revision))
    if json:
        _answer(edit, task, report, {"texts": texts, **(tables or {})}, written).print_json()
    else:
        _print(edit, task, report, tables or {}, texts)
    say_written(written, inputs.quiet)


def _texts(edit: Edit, task: EditTask, wanted: Paragraphs | None) -> DataFrame:
    """What the model writes after the targets' prefixes, before and after the edit.

    Columns `id, prefix, before, after`; with `wanted` also `wanted` and `em_wanted`, the tokens of
    it that are written.
    """
    import pandas as pd

    from memcircuits.measure.decoding import greedy_continuations
    from memcircuits.measure.snippets import passage_text
    from memcircuits.models.registry import adapt

    targets, tokenizer = task.targets, adapt(task.model).tokenizer
    before = greedy_continuations(task.model, targets, progress=False)
    with edit.apply(task.model):
        after = greedy_continuations(task.model, targets, progress=False)
    versions = {"before": before, "after": after}
    if wanted is not None:
        versions["wanted"] = wanted
    columns: dict[str, list[str]] = {"id": list(targets.names)}
    for name, paragraphs in versions.items():
        texts = [
            passage_text(row, targets.n_prefix, 0, tokenizer) for row in paragraphs.ids.tolist()
        ]
        columns.setdefault("prefix", [text.prefix for text in texts])
        columns[name] = [text.remainder for text in texts]
    frame = pd.DataFrame(columns)
    if wanted is not None:
        agrees = (after.continuation == wanted.continuation).long().cumprod(-1)
        frame["em_wanted"] = agrees.sum(-1).tolist()
    return frame


def _answer(
    edit: Edit,
    task: EditTask,
    report: EditReport,
    tables: Mapping[str, DataFrame],
    written: list[Path],
) -> Answer:
    return Answer(
        "unlearn" if "wanted" not in tables["texts"] else "edit",
        summary=f"{edit}; {report}",
        values={
            "paragraphs": list(task.targets.names),
            "stopped": edit.stopped,
            "masked": edit.n_masked,
            "changed": edit.n_changed,
            "candidates": edit.n_candidates,
            "norm": edit.norm,
        },
        tables={
            "measures": report.to_frame(),
            "matrices": edit.to_frame(),
            "steps": edit.steps(),
            **tables,
        },
        notes=report.notes,
        files=written,
        provenance=edit.provenance,
    )


def _print(
    edit: Edit,
    task: EditTask,
    report: EditReport,
    tables: Mapping[str, DataFrame],
    texts: DataFrame,
) -> None:
    frame = report.to_frame()
    print_table(frame[["set", "measure", "before", "after", "change", "ci_low", "ci_high", "n"]])
    typer.echo(textwrap.fill(_HARM, PIPED_WIDTH))
    for name, table in tables.items():
        typer.echo(f"\n{name}:")
        print_table(table)
    for row in texts.to_dict("records"):
        typer.echo(f"\n{row['id']}, what the model writes after the prefix:")
        typer.echo(_paragraph("before", row["before"]))
        typer.echo(_paragraph("after", row["after"]))
        if "wanted" in row:
            n = task.targets.n_continuation
            typer.echo(f"  {row['em_wanted']} of {n} tokens of the new continuation are recited")
    typer.echo(f"\nedited: {', '.join(task.targets.names)}\n{edit}\n{report}")
    print_notes(report.notes)
    if edit.stopped != "em":
        typer.echo(f"Note: not every target reached its goal: {_STOPPED[edit.stopped]}.")


def _paragraph(label: str, text: str) -> str:
    """A text at 80 columns behind its label."""
    import textwrap

    from memcircuits.display.text import clean

    first = f"  {label + ':':<8} "
    flat = " ".join(clean(text).split())
    return textwrap.fill(flat, 80, initial_indent=first, subsequent_indent=" " * len(first))
