"""`memcircuits perturb`: which prefix tokens does the recitation depend on?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from memcircuits.commands.inputs import Inputs, unigram_table
from memcircuits.commands.options import (
    Control,
    Json,
    MaxParagraphs,
    Out,
    Seed,
    Top,
    Unigrams,
)
from memcircuits.commands.output import Answer, print_notes, print_table, say, say_written
from memcircuits.commands.selection import choice, draw, names

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.data.unigrams import UnigramTable
    from memcircuits.display.pages import Page
    from memcircuits.evidence.triggers.minimal_sets import MinimalSets
    from memcircuits.evidence.triggers.perturbation import Perturbation

    PerturbationsOf: TypeAlias = dict[tuple[str, str], Perturbation]
    """By set and replacement."""

_FEW = 10  # intervals over fewer paragraphs are rough and mislead
_LISTED = 200  # tokens in the table of the page
_TOKEN_COLUMNS = ["id", "token", "position", "em_lost", "em", "set", "replacement"]


@dataclass(frozen=True)
class PerturbOptions:
    """What is replaced, and in which paragraphs."""

    control: Control = None
    replacement: Annotated[
        str, typer.Option(help="random, frequency, neighbor, second; several with commas.")
    ] = "random"
    draws: Annotated[int, typer.Option(min=1, help="Number of replacements per position.")] = 1
    max_paragraphs: MaxParagraphs = 20
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
    top: Top = 10,
    json: Json = False,
) -> None:
    """Replace the prefix tokens, one at a time: what is still recited, and which tokens matter?

    Printed are the tokens without which most is lost, then means, and what such tokens have in
    common. Controls are compared with the model's own continuation of their prefix. Writes a result
    per set and replacement, figure 3 of the paper (means), and triggers.html: the prefixes, their
    tokens coloured by what replacing them costs. Costs a forward pass per paragraph, prefix token,
    draw and replacement.

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
    tables = {
        "tokens": _tokens(results, model),
        "drop": _drops(results),
        "causes": _causes(results, table),
        **{f"minimal_sets_{name}": result.to_frame() for name, result in minimal.items()},
    }
    page = _page(results, tables, model, top)
    written = [*_write(results, out), page.save(out / "triggers.html")]
    written += [
        result.save(out / f"minimal-sets-{name}.safetensors") for name, result in minimal.items()
    ]
    if json:
        Answer(
            "perturb",
            summary="; ".join(str(result) for result in results.values()),
            tables=tables,
            notes=(*paragraphs.notes, *notes),
            files=written,
            provenance=next(iter(results.values())).provenance,
        ).print_json()
    else:
        _print(tables, minimal, notes, top)
    say_written(written, inputs.quiet)


def _sets(
    inputs: Inputs, model: Any, paragraphs: Paragraphs, options: PerturbOptions
) -> dict[str, Paragraphs]:
    """Memorized paragraphs, and controls with the model's own continuation."""
    from memcircuits.base.errors import InputError
    from memcircuits.evidence.controls import unknown_to_the_model
    from memcircuits.measure.decoding import greedy_continuations
    from memcircuits.measure.scanning import scan

    result = scan(model, paragraphs, progress=inputs.progress)
    sets = {}
    if result.memorized is not None:
        sets["memorized"] = draw(result.memorized, options.max_paragraphs, options.seed)
    unknown = unknown_to_the_model(result)
    controls = result.paragraphs[unknown] if unknown.any() else result.control
    if options.control is not None:
        controls = inputs.read(options.control, model, "--control")
    if controls is not None:
        control = draw(controls, options.max_paragraphs, options.seed)
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


def _tokens(results: PerturbationsOf, model: Any) -> pd.DataFrame:
    """Every prefix token with what replacing it costs, the largest loss of memorized ones first."""
    import pandas as pd

    from memcircuits.display.text import visible
    from memcircuits.models.registry import adapt

    tokenizer = adapt(model).tokenizer
    tables = []
    for (name, kind), result in results.items():
        frame = result.to_frame()
        if tokenizer is not None:
            labels = [result.paragraphs.tokens(tokenizer, i) for i in range(len(result.names))]
            texts = [label for row in labels for label in row[: result.n_prefix]]
            frame = frame.rename(columns={"token": "token_id"})
            frame.insert(2, "token", [visible(text, tell=False) for text in texts])
        frame = frame.rename(columns={"drop": "em_lost"})
        tables.append(frame.assign(set=name, replacement=kind))
    whole = pd.concat(tables, ignore_index=True)
    return whole.sort_values(["set", "em_lost"], ascending=False, kind="stable", ignore_index=True)


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
    tables: dict[str, pd.DataFrame], minimal: dict[str, MinimalSets], notes: list[str], top: int
) -> None:
    most, n_each = _most_needed(tables["tokens"].query("em_lost > 0"), top)
    of_each = "The token" if n_each == 1 else f"The {n_each} tokens"
    typer.echo(f"{of_each} of each paragraph whose replacement costs most (tokens of EM lost):")
    print_table(most[_TOKEN_COLUMNS])
    typer.echo("\nMean EM drop per replaced token, with 95 % intervals over paragraphs:")
    print_table(tables["drop"])
    typer.echo("\nWhy a token matters (tokens of EM per standard deviation, others held fixed):")
    causes = tables["causes"]
    first = ["set", "replacement", "cause", "coefficient", "ci_low", "ci_high"]
    print_table(causes[[*first, *(name for name in causes if name not in first)]])
    for name, result in minimal.items():
        typer.echo(f"{name}: {result}")
    print_notes(notes)


def _most_needed(tokens: pd.DataFrame, top: int) -> tuple[pd.DataFrame, int]:
    """The tokens that cost most, as many of each paragraph as make `top` rows, and how many."""
    runs = tokens.groupby(["set", "replacement", "id"], sort=False)
    n_each = max(1, top // max(1, runs.ngroups))
    most = runs.head(n_each)
    return (most.head(top) if n_each == 1 else most), n_each


def _write(results: PerturbationsOf, out: Path) -> list[Path]:
    """The results, and the means for each replacement."""
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
        figure = figures.perturbation_curves(
            curves, title=f"{kind} replacement, mean over paragraphs"
        )
        page = figure.to_html(include_plotlyjs=True)
        written.append(write_atomically(out / f"perturbation-{kind}.html", page))
    return written


def _page(results: PerturbationsOf, tables: dict[str, pd.DataFrame], model: Any, top: int) -> Page:
    """The first `top` paragraphs of each set and replacement, coloured, and the means."""
    from memcircuits.display.pages import Block, Page, Strip, Table, Tokens
    from memcircuits.models.registry import adapt

    most, _ = _most_needed(tables["tokens"].query("em_lost > 0"), _LISTED)
    blocks: list[Block] = [
        Table(tables["drop"], title="Mean EM lost by replacing one token"),
        Table(
            most[_TOKEN_COLUMNS],
            labels={"em_lost": "tokens lost", "em": "EM then"},
            title="Tokens that cost most",
            page_size=15,
        ),
    ]
    shown = {} if adapt(model).tokenizer is None else results
    for (name, kind), result in shown.items():
        n = result.ids.shape[1] - result.n_prefix
        blocks += [
            Tokens(
                result.paragraphs.tokens(model, i),
                Strip([*result.em_drop[i].tolist(), *[math.nan] * n], "tokens", limits=(0, n)),
                "EM lost",
                result.n_prefix,
                title=f"{result.names[i]} ({name}): EM {int(result.baseline_em[i])} of {n}, "
                f"{kind} replacement",
            )
            for i in range(min(top, len(result.names)))
        ]
    lead = (
        "Each token of a prefix is replaced by another one, alone. The nearer it is to the "
        "upper end of the scale, the more tokens of the continuation are then no longer recited, "
        "up to the first mistake. A control is shown with the model's own continuation of its "
        "prefix, which is what it recites."
    )
    return Page("Which prefix tokens trigger the recitation?", blocks, lead)
