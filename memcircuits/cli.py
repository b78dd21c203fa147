"""The command line: `memcircuits COMMAND`, also `python -m memcircuits`.

Data goes to stdout or into files, progress to stderr. Exit status: 0 done, 2 bad input (one line on
stderr that names argument, value and remedy), 130 interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from memcircuits.commands import (
    ablate,
    attention,
    audit,
    bench,
    circuit,
    common,
    compare,
    contrast,
    core,
    counterfactual,
    cut_prefix,
    document_map,
    edit,
    formation,
    gradients,
    heads,
    influence,
    info,
    lookups,
    patch,
    perturb,
    plant,
    report,
    scan,
    transplant,
    unigrams,
    unlearn,
    work,
)
from memcircuits.commands.usage_errors import Command, Group

app = typer.Typer(
    cls=Group,
    help="Which paragraphs does a language model recite, and which heads does that depend on?",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _as_typer_command(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer takes it: single options, and errors in one line."""
    command = common.with_options(command)
    options = common.options_of(command)

    @functools.wraps(command)
    def safe_command(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        with common.errors_in_one_line(options), work.saying_work(verbose):
            command(*args, **kwargs)

    return safe_command


_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Find": (scan.scan, document_map.map, heads.heads, report.report),
    "Explain": (
        gradients.gradients,
        ablate.ablate,
        patch.patch,
        attention.attention,
        perturb.perturb,
        counterfactual.counterfactual,
        transplant.transplant,
        formation.formation,
        cut_prefix.cut_prefix,
        influence.influence,
        contrast.contrast,
        compare.compare,
        lookups.lookups,
        core.core,
        circuit.circuit,
    ),
    "Change": (unlearn.unlearn, audit.audit, edit.edit, plant.plant),
    "Check": (info.info,),
}
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        app.command(cls=Command, rich_help_panel=_panel)(_as_typer_command(_command))
_bench = typer.Typer(cls=Group, help="Benchmarks of the methods themselves.", no_args_is_help=True)
_bench.command(cls=Command)(_as_typer_command(bench.localize))
_bench.command(cls=Command)(_as_typer_command(bench.natural))
app.add_typer(_bench, name="bench", rich_help_panel="Check")
_unigrams = typer.Typer(cls=Group, help="Token counts of a corpus.", no_args_is_help=True)
_unigrams.command(cls=Command)(_as_typer_command(unigrams.build))
app.add_typer(_unigrams, name="unigrams", rich_help_panel="Check")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memcircuits {version('memcircuits')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of `memcircuits` itself; their callbacks do the work."""


def main() -> None:
    """Entry point of the `memcircuits` script."""
    app()


if __name__ == "__main__":
    main()
