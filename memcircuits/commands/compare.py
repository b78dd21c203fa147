"""`memcircuits compare`: what is gained, lost and changed between two models or saved results."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memcircuits.commands.common import naming
from memcircuits.commands.inputs import Inputs, load
from memcircuits.commands.options import Json, Out, Seed, Top
from memcircuits.commands.output import Answer, print_notes, print_table, say, say_written

if TYPE_CHECKING:
    from memcircuits.evidence.comparisons.result import Comparison

_HEAD_COLUMNS = ["name", "score_a", "score_b", "change", "ci_low", "ci_high", "q_value"]


def compare(
    inputs: Inputs,
    a: Annotated[
        str,
        typer.Argument(
            help="A model, the folder of a scan or ranking, or a scan or ranking (.safetensors)."
        ),
    ],
    b: Annotated[str, typer.Argument(help="Another of the same kind.")],
    max_paragraphs: Annotated[
        int,
        typer.Option(
            min=2,
            help="Maximum number of memorized paragraphs, and of controls, for "
            "which heads are ablated.",
        ),
    ] = 100,
    out: Out = Path("memcircuits-compare"),
    top: Top = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare two models or saved results: passages gained and lost, heads that changed.

    Every change is B minus A. Two models are measured on the same paragraphs; scans and rankings
    are matched by theirs. Writes compare.html and compare.safetensors. With saved results, --model
    names the model whose tokenizer shows the passages.

    Example: memcircuits compare organism organism-planted --out compare
    """
    import memcircuits as mc

    saved = [_saved(value) for value in (a, b)]
    models: list[Any] = []
    options: dict[str, Any] = {"seed": seed, "progress": inputs.progress}
    if any(result is not None for result in saved):
        pair = [
            _given(r, argument) for r, argument in zip(saved, ((a, "A"), (b, "B")), strict=True)
        ]
        comparison = mc.compare(pair[0], pair[1], **options)
        comparison = dataclasses.replace(comparison, model=_shown_by(comparison, inputs))
    else:
        models, paragraphs = _load_both(inputs, a, b)
        options |= {"max_paragraphs": max_paragraphs}
        comparison = mc.compare(models[0], models[1], paragraphs, **options)
    written = [
        comparison.to_html(out / "compare.html"),
        comparison.save(out / "compare.safetensors"),
    ]
    if json:
        _answer(comparison, written).print_json()
    else:
        _print(comparison, top)
        if models:
            exchanged = f"--model {shlex.quote(b)} --twin {shlex.quote(a)} --units head,mlp,layer"
            say(f"Next, where they differ: memcircuits transplant {exchanged}", inputs.quiet)
    say_written(written, inputs.quiet)


def _saved(value: str) -> Any:
    """The scan or ranking that a path holds; None if it names a model."""
    from memcircuits.measure.corpus.folder import ScanFolder
    from memcircuits.results.result import Result

    path = Path(value)
    if path.suffix == ".safetensors" and not path.is_dir():
        return Result.load(path)
    if (path / "manifest.json").is_file():
        return ScanFolder.open(path)
    if (path / "ranking.safetensors").is_file():
        return Result.load(path / "ranking.safetensors")
    return None


def _given(result: Any, argument: tuple[str, str]) -> Any:
    from memcircuits.base.errors import InputError

    value, name = argument
    if result is None:
        raise InputError(
            name, value, "it is a model and the other a saved result: give two of one kind"
        )
    return result


def _load_both(inputs: Inputs, a: str, b: str) -> tuple[list[Any], Any]:
    """Both models, and the paragraphs; those shipped where both models are."""
    each = [dataclasses.replace(inputs, model=name) for name in (a, b)]
    for option, one in zip("AB", each, strict=True):
        with naming(option, "--model"):
            one.check_paragraphs_given()
    with naming("A", "--model"):
        first, paragraphs = each[0].load()
    if inputs.paragraphs is None:
        from memcircuits.data.paragraphs import Paragraphs

        paragraphs = Paragraphs.shipped()
    return [first, load(b, inputs.quiet, "B", **inputs.loading)], paragraphs


def _shown_by(comparison: Comparison, inputs: Inputs) -> Any:
    """A model whose tokenizer shows the passages of saved scans, where --model is one of theirs."""
    names = {comparison.provenance.model["name"], comparison.provenance.options["a"]["name"]}
    if comparison.has_passages and inputs.model in names:
        return load(inputs.model, inputs.quiet, **inputs.loading)
    return None


def _answer(comparison: Comparison, written: list[Path]) -> Answer:
    tables = {"paragraphs": comparison.to_frame()}
    if comparison.has_heads:
        tables["heads"] = comparison.heads_frame()
    return Answer(
        "compare",
        summary=str(comparison),
        values={"labels": list(comparison.labels)},
        tables=tables,
        notes=comparison.notes,
        files=written,
        provenance=comparison.provenance,
    )


def _print(comparison: Comparison, top: int) -> None:
    typer.echo(str(comparison))
    if comparison.has_passages:
        change = comparison.em[1] - comparison.em[0]
        kinds: dict[Literal["gains", "losses"], int] = {
            "gains": int((change > 0).sum()),
            "losses": int((change < 0).sum()),
        }
        for kind, count in kinds.items():
            typer.echo(
                f"\nLargest {kind} of EM; {count:,} paragraphs have one, in part or in full:"
            )
            print_table(comparison.changes(kind, top))
    if comparison.has_heads:
        typer.echo("\nHeads with the largest change of the score (nats/token), 95 % interval:")
        print_table(comparison.heads_frame()[_HEAD_COLUMNS].head(top))
    print_notes(comparison.notes)
