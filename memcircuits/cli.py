"""The command line: `memcircuits COMMAND`, also `python -m memcircuits`.

Data goes to stdout or into files, progress to stderr. Exit status: 0 done, 2 bad input (one line on
stderr that names argument, value and remedy), 130 interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from memcircuits.commands import (
    ablate,
    attention,
    bench,
    common,
    edit,
    gradients,
    heads,
    info,
    patch,
    perturb,
    plant,
    report,
    scan,
    unigrams,
    unlearn,
)

app = typer.Typer(
    help="Which paragraphs does a language model recite, and which heads does that hang on?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _safely(command: Callable[..., None]) -> Callable[..., None]:
    command = common.with_source(command)

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        with common.errors_in_one_line():
            command(*args, **kwargs)

    return wrapped


for _command in (
    heads.heads,
    report.report,
    scan.scan,
    gradients.gradients,
    ablate.ablate,
    attention.attention,
    perturb.perturb,
    patch.patch,
    unlearn.unlearn,
    edit.edit,
    plant.plant,
    info.info,
):
    app.command()(_safely(_command))
_tables = typer.Typer(help="Token counts of a corpus.", no_args_is_help=True)
_tables.command()(_safely(unigrams.build))
app.add_typer(_tables, name="unigrams")
_benches = typer.Typer(help="Benchmarks of the methods themselves.", no_args_is_help=True)
_benches.callback()(lambda: None)  # a group, though it has one command
_benches.command()(_safely(bench.localize))
app.add_typer(_benches, name="bench")


def main() -> None:
    """Entry point of the `memcircuits` script."""
    app()


if __name__ == "__main__":
    main()
