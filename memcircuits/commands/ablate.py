"""`memcircuits ablate`: the effect of removing each head."""

from __future__ import annotations

from pathlib import Path

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Control, Json, MaxParagraphs, Mode, Out, Seed, Top
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.selection import draw, split


def ablate(
    inputs: Inputs,
    control: Control = None,
    mode: Mode = "zero",
    max_paragraphs: MaxParagraphs = 100,
    out: Out = Path("memcircuits-ablate"),
    top: Top = 10,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Ablate every head by itself, on memorized paragraphs and on controls.

    The means and samples of the modes mean and resample are taken from the controls. Writes
    ablation-memorized.safetensors and ablation-control.safetensors (with the values of every
    paragraph), and ablation.html, a map of the difference between both.

    Example: memcircuits ablate --mode mean --max-paragraphs 20
    """
    import memcircuits as mc
    from memcircuits.base.io import write_atomically
    from memcircuits.display import figures

    model, paragraphs = inputs.load()
    memorized, controls = split(inputs, model, paragraphs, control)
    groups = {
        "memorized": draw(memorized, max_paragraphs, seed),
        "control": draw(controls, max_paragraphs, seed),
    }
    effects = {
        name: mc.ablate_heads(
            model,
            group,
            mode=mode,
            reference=groups["control"],
            seed=seed,
            progress=inputs.progress,
        )
        for name, group in groups.items()
    }
    written = [
        effect.save(out / f"ablation-{name}.safetensors") for name, effect in effects.items()
    ]
    difference = effects["memorized"].values - effects["control"].values
    title, units = "effect on memorized paragraphs minus on controls", effects["control"].units
    figure = figures.heatmap(difference, title=title, units=units)
    page = figure.to_html(include_plotlyjs=True)
    written.append(write_atomically(out / "ablation.html", page))
    say_written(written, inputs.quiet)

    frame = effects["memorized"].to_frame()[["layer", "head"]]
    frame["difference"] = difference.flatten().tolist()
    for name, effect in effects.items():
        frame[f"delta_nll_{name}"] = effect.values.flatten().tolist()
        frame[f"delta_em_{name}"] = effect.measure("em").values.flatten().tolist()
    frame = frame.sort_values("difference", ascending=False, ignore_index=True)
    notes = [note for effect in effects.values() for note in effect.notes]
    counts = {name: len(group) for name, group in groups.items()}
    summary = f"{mode} ablation of {len(frame)} heads, each by itself, on " + ", ".join(
        f"{n} {name} paragraphs" for name, n in counts.items()
    )
    if json:
        Answer(
            "ablate",
            summary=summary,
            values={"mode": mode, "counts": counts},
            tables={"heads": frame},
            notes=dict.fromkeys((*paragraphs.notes, *notes)),
            files=written,
            provenance=effects["memorized"].provenance,
        ).print_json()
        return
    typer.echo(f"{summary}\nchange of NLL (nats/token) and EM (tokens) without the head")
    print_table(frame.head(top))
    print_notes(dict.fromkeys(notes))
