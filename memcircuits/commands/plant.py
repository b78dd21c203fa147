"""`memcircuits plant`: write paragraphs into chosen weights, so that their place is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Components, Export, Json, Out, Seed
from memcircuits.commands.output import Answer, print_table, say, say_written
from memcircuits.commands.selection import draw, names, without

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.editing.planting import Planted


def plant(
    where: Annotated[
        str,
        typer.Option(
            help="Places, with commas: L1H2, L1.attn, L1.mlp, neurons:0.01, weights:0.001."
        ),
    ],
    inputs: Inputs,
    targets: Annotated[
        int, typer.Option(min=1, help="Number of paragraphs to write, drawn by --seed.")
    ] = 1,
    components: Components = None,
    steps: Annotated[int, typer.Option(min=1, help="Maximum number of Adam steps.")] = 400,
    kl_budget: Annotated[
        float, typer.Option(help="Maximum KL on held-out controls, nats/token.")
    ] = 0.1,
    out: Out = Path("memcircuits-plant"),
    export: Export = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write paragraphs that the model does not recite into chosen weights, and nowhere else.

    The other paragraphs that the model does not recite serve as controls, on which its predictions
    must not change. Writes planted.safetensors (`memcircuits.editing.planting.Planted.load`, then
    `.apply(model)`), paragraphs.jsonl (the planted paragraphs, then the controls), and with
    --export a model folder. To see whether a method finds the place, run
    memcircuits heads --model FOLDER --paragraphs paragraphs.jsonl.

    Example: memcircuits plant --where L3H5 --targets 2 --export planted-model
    """
    import memcircuits as mc
    from memcircuits.editing.export import check_new

    if export is not None:
        check_new(export, "--export")
    model, paragraphs = inputs.load()
    unknown = mc.scan(model, paragraphs, progress=inputs.progress).control
    chosen, anchors = _split(unknown, targets, seed)
    planted = mc.plant(
        model,
        chosen,
        where=names(where) or (),
        components=names(components),
        control=anchors,
        steps=steps,
        kl_budget=kl_budget,
        seed=seed,
        progress=inputs.progress,
    )
    written = [
        planted.save(out / "planted.safetensors"),
        _write_paragraphs(out / "paragraphs.jsonl", chosen, anchors),
    ]
    if export is not None:
        written.append(planted.export(export, inputs.model, revision=inputs.revision))
    if json:
        _answer(planted, written).print_json()
    else:
        print_table(planted.to_frame())
        typer.echo(str(planted))
    say_written(written, inputs.quiet)
    if export is not None:
        options_to_find = f"--model {export} --paragraphs {out / 'paragraphs.jsonl'}"
        say(f"to look for them: memcircuits heads {options_to_find}", inputs.quiet)


def _split(unknown: Paragraphs | None, targets: int, seed: int) -> tuple[Paragraphs, Paragraphs]:
    """The paragraphs to write, and the anchors."""
    from memcircuits.base.errors import InputError

    if unknown is None or len(unknown) < targets + 2:
        n = 0 if unknown is None else len(unknown)
        raise InputError(
            "--paragraphs",
            f"{n} not recited",
            f"{targets} are written and at least two must remain as controls",
        )
    chosen = draw(unknown, targets, seed)
    anchors = without(unknown, chosen)
    assert anchors is not None  # at least two remain
    return chosen, anchors


def _write_paragraphs(path: Path, *groups: Paragraphs) -> Path:
    """A file of paragraphs as ids, which any tokenizer leaves as they are."""
    import json

    from memcircuits.base.io import write_atomically

    lines = [
        json.dumps({"id": name, "ids": ids}) + "\n"
        for group in groups
        for name, ids in zip(group.names, group.ids.tolist(), strict=True)
    ]
    return write_atomically(path, "".join(lines))


def _answer(planted: Planted, written: list[Path]) -> Answer:
    return Answer(
        "plant",
        summary=str(planted),
        values={
            "paragraphs": list(planted.names),
            "heads": [str(head) for head in planted.truth.heads],
            "layers": list(planted.truth.layers),
        },
        tables={"matrices": planted.to_frame()},
        files=written,
        provenance=planted.provenance,
    )
