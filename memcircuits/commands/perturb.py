"""`memcircuits perturb`: which prefix tokens does the recitation depend on?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import Json, Out, Seed, Unigrams
from memcircuits.commands.output import (
    print_json,
    print_notes,
    print_table,
    records,
    say,
    say_written,
)
from memcircuits.commands.selection import choice, draw, names

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.data.unigrams import UnigramTable
    from memcircuits.evidence.triggers.minimal_sets import MinimalSets
    from memcircuits.evidence.triggers.perturbation import Perturbation

    PerturbationsOf: TypeAlias = dict[tuple[str, str], Perturbation]
    """By set and replacement."""

_FEW = 10  # intervals over fewer paragraphs are rough and mislead


@dataclass(frozen=True)
class PerturbOptions:
    """What is replaced, and in which paragraphs."""

    replacement: Annotated[
        str, typer.Option(help="random, frequency, neighbor, second; several with commas.")
    ] = "random"
    draws: Annotated[int, typer.Option(min=1, help="Number of replacements per position.")] = 1
    max_paragraphs: Annotated[
        int, typer.Option(min=1, help="Maximum number of memorized paragraphs, and of controls.")
    ] = 20
    unigrams: Unigrams = None
    minimal: Annotated[
        bool,
        typer.Option("--minimal", help="Also search the smallest sets of prefix tokens."),
    ] = False
    seed: Seed = 0


def perturb(
    inputs: Inputs,
    options: PerturbOptions,
    out: Out = Path("memcircuits-perturb"),
    json: Json = False,
) -> None:
    """Replace the prefix tokens, one at a time: what is still recited, and which tokens matter?

    Controls are compared with the model's own continuation of their prefix. Writes a result per set
    and replacement, and figure 3 of the paper (means, and the first memorized paragraph). Costs a
    forward pass per paragraph, prefix token, draw and replacement.

    Example: memcircuits perturb --replacement random,frequency,neighbor,second --max-paragraphs 60
    """
    from memcircuits.evidence.triggers.replacements import REPLACEMENTS

    kinds = [
        choice("--replacement", kind, REPLACEMENTS) for kind in names(options.replacement) or ()
    ]
    model, paragraphs = inputs.load()
    table = unigram_table(inputs.model, options.unigrams)
    sets = _sets(inputs, model, paragraphs, options)
    shared = {"unigrams": table, "seed": options.seed, "progress": inputs.progress}
    results: PerturbationsOf = {}
    for kind in kinds:
        for name, group in sets.items():
            results[name, kind] = _perturb(inputs, model, name, group, kind, options.draws, shared)
    minimal = _minimal_sets(model, sets, shared) if options.minimal else {}

    notes = list(dict.fromkeys(note for result in results.values() for note in result.notes))
    if table is None:
        table = _counted(model, paragraphs, sets)
        notes.append("no unigram table was given: rarity is counted in the paragraphs")
    notes += [
        f"{len(group)} {name} paragraphs: too few to say much about others like them"
        for name, group in sets.items()
        if len(group) < _FEW
    ]
    written = _write(results, out)
    written += [
        result.save(out / f"minimal-sets-{name}.safetensors") for name, result in minimal.items()
    ]
    _print(_drops(results), _causes(results, table), minimal, notes, json)
    say_written(written, inputs.quiet)


def _sets(
    inputs: Inputs, model: Any, paragraphs: Paragraphs, options: PerturbOptions
) -> dict[str, Paragraphs]:
    """Memorized paragraphs, and controls with the model's own continuation."""
    from memcircuits.base.errors import InputError
    from memcircuits.measure.decoding import greedy_continuations
    from memcircuits.measure.scanning import scan

    result = scan(model, paragraphs, progress=inputs.progress)
    sets = {}
    if result.memorized is not None:
        sets["memorized"] = draw(result.memorized, options.max_paragraphs, options.seed)
    if result.control is not None:
        control = draw(result.control, options.max_paragraphs, options.seed)
        sets["control"] = greedy_continuations(model, control, progress=inputs.progress)
    if not sets:
        raise InputError(
            "--paragraphs", "all partly recited", "give some that are memorized or hardly recited"
        )
    return sets


def _perturb(
    inputs: Inputs,
    model: Any,
    name: str,
    group: Paragraphs,
    kind: Any,
    draws: int,
    shared: dict[str, Any],
) -> Perturbation:
    from memcircuits.evidence.triggers.perturbation import perturb_prefix

    n_passes = len(group) * group.n_prefix * draws
    say(f"{kind} replacement in {len(group)} {name} paragraphs: {n_passes:,} passes", inputs.quiet)
    return perturb_prefix(model, group, replacement=kind, draws=draws, **shared)


def _minimal_sets(
    model: Any, sets: dict[str, Paragraphs], shared: dict[str, Any]
) -> dict[str, MinimalSets]:
    from memcircuits.evidence.triggers.minimal_sets import minimal_sets

    return {name: minimal_sets(model, group, **shared) for name, group in sets.items()}


def _counted(model: Any, paragraphs: Paragraphs, sets: dict[str, Paragraphs]) -> UnigramTable:
    """Token counts of the paragraphs themselves."""
    from memcircuits.data.unigrams import UnigramTable

    n_ids = max(int(group.ids.max()) for group in sets.values()) + 1
    return UnigramTable.from_tokens(paragraphs.ids, max(n_ids, model.cfg.d_vocab))


def _drops(results: PerturbationsOf) -> pd.DataFrame:
    """Mean EM drop of every set and replacement, with its interval."""
    import pandas as pd

    rows = []
    for (name, kind), result in results.items():
        mean, low, high = result.mean_em_drop()
        interval = {"em_drop": mean, "ci_low": low, "ci_high": high}
        rows.append({"set": name, "replacement": kind, "n": len(result.names), **interval})
    return pd.DataFrame(rows)


def _causes(results: PerturbationsOf, table: UnigramTable) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(
        [
            result.causes(table).assign(set=name, replacement=kind)
            for (name, kind), result in results.items()
        ]
    )


def _print(
    drops: pd.DataFrame,
    causes: pd.DataFrame,
    minimal: dict[str, MinimalSets],
    notes: list[str],
    json: bool,
) -> None:
    if json:
        print_json(
            {
                "drop": records(drops),
                "causes": records(causes),
                "minimal_sets": {name: records(r.to_frame()) for name, r in minimal.items()},
                "notes": notes,
            }
        )
        return
    typer.echo("Mean EM drop per replaced token, with 95 % intervals over paragraphs:")
    print_table(drops)
    typer.echo("Why a token matters (tokens of EM per standard deviation, others held fixed):")
    print_table(causes)
    for name, result in minimal.items():
        typer.echo(f"{name}: {result}")
    print_notes(notes)


def _write(results: PerturbationsOf, out: Path) -> list[Path]:
    """The results, and two pages per replacement: the means, and the first paragraph."""
    import pandas as pd

    from memcircuits.base.io import write_atomically
    from memcircuits.display import figures

    written = [
        result.save(out / f"perturbation-{kind}-{name}.safetensors")
        for (name, kind), result in results.items()
    ]
    for kind in dict.fromkeys(kind for _, kind in results):
        of_kind = {name: result for (name, other), result in results.items() if other == kind}
        curves = pd.concat([result.curves().assign(set=name) for name, result in of_kind.items()])
        pages = {
            f"perturbation-{kind}.html": figures.perturbation_curves(
                curves, title=f"{kind} replacement, mean over paragraphs"
            ),
            f"perturbation-{kind}-first.html": next(iter(of_kind.values())).figure(0),
        }
        written += [
            write_atomically(out / name, figure.to_html(include_plotlyjs=True))
            for name, figure in pages.items()
        ]
    return written
