"""`memcircuits plant`: write paragraphs into chosen weights, to know the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands.options import Components, Export
from memcircuits.commands.selection import draw, names, without


def plant(
    where: Annotated[
        str,
        typer.Option(
            help="Places, with commas: L1H2, L1.attn, L1.mlp, neurons:0.01, weights:0.001."
        ),
    ],
    source: c.Source,
    targets: Annotated[
        int, typer.Option(min=1, help="So many paragraphs are written, drawn by --seed.")
    ] = 1,
    components: Components = None,
    steps: Annotated[int, typer.Option(min=1, help="Adam steps at most.")] = 400,
    kl_budget: Annotated[
        float, typer.Option(help="KL on held-out anchors to be reached, nats/token.")
    ] = 0.1,
    out: c.Out = Path("memcircuits-plant"),
    export: Export = None,
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Write paragraphs that the model does not recite into chosen weights, and nowhere else.

    The other paragraphs that it does not recite are the anchors, on which it must not change.
    Writes planted.safetensors (`memcircuits.editing.planting.Planted.load`, then `.apply(model)`),
    paragraphs.jsonl (what was written, then the anchors), and with --export a model folder. Then
    see whether it is found: memcircuits heads --model FOLDER --paragraphs paragraphs.jsonl.

    Example: memcircuits plant --where L3H5 --targets 2 --export planted-model
    """
    import json as text

    import memcircuits as mc
    from memcircuits.core.errors import InputError
    from memcircuits.core.io import write_atomically
    from memcircuits.editing.export import check_new

    if export is not None:
        check_new(export, "--export")
    loaded, given = source.load()
    unknown = mc.scan(loaded, given, progress=not source.quiet).control
    if unknown is None or len(unknown) < targets + 2:
        n = 0 if unknown is None else len(unknown)
        raise InputError(
            "--paragraphs", f"{n} not recited", f"{targets} are written and two must be left"
        )
    chosen = draw(unknown, targets, seed)
    anchors = without(unknown, chosen)
    assert anchors is not None  # two at least are left
    found = mc.plant(
        loaded,
        chosen,
        where=names(where) or (),
        components=names(components),
        control=anchors,
        steps=steps,
        kl_budget=kl_budget,
        seed=seed,
        progress=not source.quiet,
    )
    rows = [
        text.dumps({"id": name, "ids": ids})
        for group in (chosen, anchors)
        for name, ids in zip(group.names, group.ids.tolist(), strict=True)
    ]
    paths = [
        found.save(out / "planted.safetensors"),
        write_atomically(out / "paragraphs.jsonl", "\n".join(rows) + "\n"),
    ]
    if export is not None:
        paths.append(found.export(export, source.model, revision=source.revision))
    frame = found.to_frame()
    if json:
        c.print_json(
            {
                "summary": str(found),
                "paragraphs": list(found.names),
                "heads": [str(head) for head in found.truth.heads],
                "layers": list(found.truth.layers),
                "matrices": c.records(frame),
            }
        )
    else:
        c.print_table(frame)
        typer.echo(str(found))
    for path in paths:
        c.say(f"wrote {path}", source.quiet)
    if export is not None:
        where_to = f"--model {export} --paragraphs {out / 'paragraphs.jsonl'}"
        c.say(f"is it found? memcircuits heads {where_to}", source.quiet)
