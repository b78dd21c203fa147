"""`memcircuits perturb`: which prefix tokens the recitation hangs on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c
from memcircuits.commands.selection import draw, names

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.evidence.triggers.perturbation import Perturbation


_FEW = 10  # intervals over fewer paragraphs are rough, and mislead


def perturb(
    source: c.Source,
    replacement: Annotated[
        str, typer.Option(help="random, frequency, neighbor, second; several with commas.")
    ] = "random",
    draws: Annotated[int, typer.Option(min=1, help="Replacements per position.")] = 1,
    max_paragraphs: Annotated[
        int, typer.Option(min=1, help="At most so many memorized paragraphs and so many controls.")
    ] = 20,
    unigrams: Annotated[
        Path | None, typer.Option(help="Unigram table (.safetensors) that defines rarity.")
    ] = None,
    minimal: Annotated[
        bool, typer.Option("--minimal", help="Also search the smallest sets of prefix tokens.")
    ] = False,
    out: c.Out = Path("memcircuits-perturb"),
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Replace the prefix tokens, one at a time: what is still recited, and which tokens matter?

    Controls are measured against what the model writes by itself. Writes a result per set and
    replacement, and figure 3 of the paper (means, and the first memorized paragraph). Costs a
    forward pass per paragraph, prefix token, draw and replacement.

    Example: memcircuits perturb --replacement random,frequency,neighbor,second --max-paragraphs 60
    """
    import pandas as pd

    from memcircuits.core.errors import one_of
    from memcircuits.data.unigrams import UnigramTable
    from memcircuits.evidence.triggers.minimal_sets import minimal_sets
    from memcircuits.evidence.triggers.perturbation import perturb_prefix
    from memcircuits.evidence.triggers.replacements import REPLACEMENTS

    kinds = names(replacement) or []
    for kind in kinds:
        one_of("--replacement", kind, REPLACEMENTS)
    loaded, given = source.load()
    table = source.unigrams(unigrams)
    sets = _sets(source, loaded, given, max_paragraphs, seed)
    options: dict[str, Any] = {"unigrams": table, "seed": seed, "progress": not source.quiet}
    results: dict[tuple[str, str], Perturbation] = {}
    for kind in kinds:
        for name, group in sets.items():
            passes = len(group) * group.n_prefix * draws
            c.say(
                f"{kind} replacement in {len(group)} {name} paragraphs: {passes:,} passes",
                source.quiet,
            )
            chosen: dict[str, Any] = {"replacement": kind, "draws": draws, **options}
            results[name, kind] = perturb_prefix(loaded, group, **chosen)
    notes = list(dict.fromkeys(note for result in results.values() for note in result.notes))
    if table is None:
        size = max(int(group.ids.max()) for group in sets.values()) + 1
        table = UnigramTable.from_tokens(given.ids, max(size, loaded.cfg.d_vocab))
        notes.append("no unigram table was given: rarity is counted in the paragraphs")
    notes += [
        f"{len(group)} {name} paragraphs: too few to say much about others like them"
        for name, group in sets.items()
        if len(group) < _FEW
    ]
    drops = pd.DataFrame(
        {"set": name, "replacement": kind, "n": len(result.names), **_drop(result)}
        for (name, kind), result in results.items()
    )
    causes = pd.concat(
        [
            result.causes(table).assign(set=name, replacement=kind)
            for (name, kind), result in results.items()
        ]
    )
    fewest = {
        name: minimal_sets(loaded, group, **options)
        for name, group in (sets.items() if minimal else ())
    }
    written = _write(results, out)
    written += [
        result.save(out / f"minimal-sets-{name}.safetensors") for name, result in fewest.items()
    ]
    if json:
        c.print_json(
            {
                "drop": c.records(drops),
                "causes": c.records(causes),
                "minimal_sets": {name: c.records(r.to_frame()) for name, r in fewest.items()},
                "notes": notes,
            }
        )
    else:
        typer.echo("Mean EM drop per replaced token, with 95 % intervals over paragraphs:")
        c.print_table(drops)
        typer.echo("Why a token matters (tokens of EM per standard deviation, others held fixed):")
        c.print_table(causes)
        for name, result in fewest.items():
            typer.echo(f"{name}: {result}")
        for note in notes:
            typer.echo(f"Note: {note}")
    for path in written:
        c.say(f"wrote {path}", source.quiet)


def _sets(
    source: c.Source, model: Any, given: Paragraphs, most: int, seed: int
) -> dict[str, Paragraphs]:
    """Memorized paragraphs, and controls with the model's own continuation."""
    from memcircuits.core.errors import InputError
    from memcircuits.measure.decoding import greedy_continuations
    from memcircuits.measure.scanning import scan

    found = scan(model, given, progress=not source.quiet)
    sets = {}
    if found.memorized is not None:
        sets["memorized"] = draw(found.memorized, most, seed)
    if found.control is not None:
        controls = draw(found.control, most, seed)
        sets["control"] = greedy_continuations(model, controls, progress=not source.quiet)
    if not sets:
        raise InputError(
            "--paragraphs", "all partly recited", "give some that are memorized or hardly recited"
        )
    return sets


def _drop(result: Perturbation) -> dict[str, float]:
    mean, low, high = result.mean_em_drop()
    return {"em_drop": mean, "ci_low": low, "ci_high": high}


def _write(results: dict[tuple[str, str], Perturbation], out: Path) -> list[Path]:
    import pandas as pd

    from memcircuits.core.io import write_atomically
    from memcircuits.display import figures

    written = [
        result.save(out / f"perturbation-{kind}-{name}.safetensors")
        for (name, kind), result in results.items()
    ]
    for kind in dict.fromkeys(kind for _, kind in results):
        here = {name: result for (name, k), result in results.items() if k == kind}
        curves = pd.concat([result.curves().assign(set=name) for name, result in here.items()])
        pages = {
            f"perturbation-{kind}.html": figures.perturbation_curves(
                curves, title=f"{kind} replacement, mean over paragraphs"
            ),
            f"perturbation-{kind}-first.html": next(iter(here.values())).figure(0),
        }
        written += [
            write_atomically(out / name, figure.to_html(include_plotlyjs=True))
            for name, figure in pages.items()
        ]
    return written
