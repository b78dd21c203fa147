"""What commands print: data on stdout, as tables or JSON, and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd


def say(text: str, quiet: bool) -> None:
    """Print a line of progress on stderr."""
    if not quiet:
        typer.echo(text, err=True)


def say_written(paths: Iterable[Path], quiet: bool) -> None:
    """Name the files that were written, on stderr."""
    for path in paths:
        say(f"wrote {path}", quiet)


def print_notes(notes: Iterable[str]) -> None:
    """Print the notes of a result on stdout."""
    for note in notes:
        typer.echo(f"Note: {note}")


def print_json(data: Any) -> None:
    """Print data on stdout as JSON; it must hold no NaN (see `records`)."""
    typer.echo(json.dumps(data, indent=1, allow_nan=False))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON; NaN becomes null, and values of other types their text."""
    from memcircuits.base.json_values import readable_value

    objects = frame.select_dtypes(exclude=["number", "bool", "datetime", "datetimetz"])
    plain = frame.assign(**{str(name): objects[name].map(readable_value) for name in objects})
    text = plain.to_json(orient="records", double_precision=10, date_format="iso")
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def print_table(frame: pd.DataFrame) -> None:
    """Print a table on stdout, numbers with four digits.

    On a terminal it is fitted to the width. In a pipe or a file it is plain text, with all columns
    in full.
    """
    if sys.stdout.isatty():
        _print_on_terminal(frame)
    else:
        typer.echo(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def _print_on_terminal(frame: pd.DataFrame) -> None:
    from pandas.api.types import is_numeric_dtype
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in frame.columns:
        is_number = is_numeric_dtype(frame[name])
        table.add_column(Text(str(name)), justify="right" if is_number else "left")
    for row in frame.itertuples(index=False):
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
        table.add_row(*(Text(cell) for cell in cells))  # Text: brackets in names are no markup
    Console().print(table)
