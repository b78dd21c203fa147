"""What `memcircuits scan` prints: the longest recitations as text, totals, what to run next."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from memcircuits.commands.inputs import Inputs, is_shipped
from memcircuits.commands.output import PIPED_WIDTH, print_notes, print_table, say

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.measure.scanning import Scan


def print_scan(inputs: Inputs, result: Scan, top: int, said: Iterable[str]) -> None:
    """Print the longest recitations and the totals; notes that were `said` are not repeated."""
    from memcircuits.measure.overlapping_windows import are_windows
    from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS
    from memcircuits.measure.scan_page import about_measures, about_windows

    print_notes(note for note in result.notes if note not in said)
    n, noun = len(result.names), "windows" if are_windows(result.names) else "passages"
    if top:
        typer.echo("The longest recitations (end of the prefix | continuation; whole: --html):")
        print_table(_shown(result.longest(top)))
        for line in (
            *about_measures(result),
            *about_windows(result),
            *_about_longest(inputs, result),
        ):
            typer.echo(textwrap.fill(line, PIPED_WIDTH))
    if n > top:
        typer.echo(f"... {n:,} {noun}; more with --top {n}, all columns with --json")
    if any(key in result.metadata for key in REPETITION_COLUMNS):
        typer.echo("\nBy the number of times seen in training:")
        print_table(result.by_repetitions())
    typer.echo("")
    for line in _about_roles(inputs, result):
        typer.echo(textwrap.fill(line, PIPED_WIDTH))
    for row in totals_by_role(result.to_frame()).to_dict("records"):
        near = f", {row['near_verbatim']} near-verbatim" if "near_verbatim" in row else ""
        typer.echo(
            f"{row['group']}: {row['n']:,} {noun}, {row['memorized']:,} memorized, mean EM "
            f"{row['em']:.2f}, mean NLL {row['nll']:.3f} nats/token{near}"
        )
    memorized, places = int(result.is_memorized.sum()), result.n_places
    if places < memorized:
        typer.echo(f"The {memorized:,} memorized windows overlap: they lie in {places:,} places.")


def _about_roles(inputs: Inputs, result: Scan) -> list[str]:
    """What the roles of the shipped paragraphs mean."""
    if inputs.paragraphs is not None or not is_shipped(inputs.model):
        return []
    if "role" not in result.metadata:
        return []
    return [
        "Groups: whose training text held the passages: that of the organism, of its twin, of both "
        "or of neither."
    ]


def _about_longest(inputs: Inputs, result: Scan) -> list[str]:
    """That a recitation of the whole continuation may go on behind it."""
    n, n_continuation = int(result.is_memorized.sum()), result.token_correct.shape[1]
    if n < 2:
        return []
    places = f" in {result.n_places:,} places" if result.n_places < n else ""
    said = (
        f"{n:,} are recited to the end of their {n_continuation} tokens{places}. They are equally "
        "long, and in the order of their loss"
    )
    if inputs.paragraphs is None:
        return [f"{said}. The shipped paragraphs have no more text."]
    return [
        f"{said}. A longer --n-continuation tells how far they go on, where the rows are as long "
        "and the model's context allows it."
    ]


def _shown(longest: pd.DataFrame) -> pd.DataFrame:
    """The table as it is printed: no numbers of samples that nobody draws."""
    from memcircuits.measure.sampling import MOST_SAMPLES

    if "samples" not in longest:
        return longest
    return longest.assign(samples=longest["samples"].where(longest["samples"] <= MOST_SAMPLES))


def totals_by_role(frame: pd.DataFrame) -> pd.DataFrame:
    """Counts and means over all passages and, where known, per role."""
    import pandas as pd

    groups = {"all": frame}
    if "role" in frame:
        groups |= dict(iter(frame.groupby("role")))
    rows = []
    for name, group in groups.items():
        row = {
            "group": str(name),
            "n": len(group),
            "memorized": int(group["memorized"].sum()),
            "em": float(group["em"].mean()),
            "max_em": int(group["em"].max()),
            "nll": float(group["nll"].mean()),
        }
        if "near_verbatim" in group:
            row["near_verbatim"] = int(group["near_verbatim"].sum())
        rows.append(row)
    return pd.DataFrame(rows)


def say_next(inputs: Inputs, em: Any, n_continuation: int) -> None:
    """The command to run next, on stderr: it repeats the paths that were typed."""
    if inputs.paragraphs is not None and inputs.stride is not None:
        say_missed(em, inputs.n_prefix, n_continuation, inputs.stride)
    if (em == n_continuation).any():
        say(f"Next: memcircuits heads {inputs.typed}".rstrip(), inputs.quiet)
    elif inputs.paragraphs is not None and inputs.stride is None:
        every = inputs.n_prefix + inputs.n_continuation
        remedy = f"--stride {max(1, every // 10)}, or a shorter --n-continuation"
        say(f"Next: try other windows with {remedy}", inputs.quiet)


def say_missed(em: Any, n_prefix: int, n_continuation: int, stride: int) -> None:
    """What may begin between the windows, which lie `stride` tokens apart."""
    from memcircuits.measure.recitation_statistics import (
        borders_on_recitation,
        missed_between_windows,
    )

    if stride == 1:
        return
    partly = int(borders_on_recitation(em, n_continuation, stride).sum())
    windows = "1 window is" if partly == 1 else f"{partly:,} windows are"
    nearly = f"{windows} recited nearly in full. " if partly else ""
    missed = missed_between_windows(n_prefix + n_continuation, stride)
    typer.echo(
        f"{nearly}{missed} --stride 1 finds all; where passages are paragraphs of their own, "
        "--txt paragraph does, too.",
        err=True,
    )
