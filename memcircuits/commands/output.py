"""What commands print: tables and texts on stdout, or one JSON object; progress on stderr.

Every command that has `--json` prints one object of the same form, an `Answer`, described by
`output.schema.json` beside this module. Tables are set by rich in as many columns as fit: the width
of the terminal, and 80 characters in a pipe or a file, or what the variable COLUMNS says. A column
`text`, the last, is always shown; columns that do not fit are named below the table. Heads are
written as options take them, `L0H5`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memcircuits.display.text import UNKNOWN, clean

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from memcircuits.results.provenance import Provenance

SCHEMA = "memcircuits.command/1"

PIPED_WIDTH = 80
_SHORTEST_TEXT = 20  # characters to which the last column of a table may be cut
_GAP = 2


@dataclass(frozen=True)
class Answer:
    """What a command found, in the form of `output.schema.json`.

    Attributes:
        command: its name, such as `bench localize`.
        summary: the answer in a sentence.
        tables: name -> rows.
        values: name -> number, text or list.
        notes: what the reader must know.
        files: what was written; printed are the names alone, not where the files lie.
        provenance: model, paragraphs, options and versions; None where nothing was measured.
    """

    command: str
    summary: str
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    notes: Iterable[str] = ()
    files: Sequence[Path] = ()
    provenance: Provenance | None = None

    def print_json(self) -> None:
        """Print it on stdout as JSON; NaN and infinities become null."""
        from memcircuits.base.json_values import readable_value

        provenance = self.provenance
        data = {
            "schema": SCHEMA,
            "command": self.command,
            "summary": self.summary,
            "values": {name: _finite(readable_value(v)) for name, v in self.values.items()},
            "tables": {name: records(with_heads(frame)) for name, frame in self.tables.items()},
            "notes": list(self.notes),
            "files": [path.name for path in self.files],
            "provenance": provenance and _finite(readable_value(dataclasses.asdict(provenance))),
        }
        typer.echo(json.dumps(data, indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value


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


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON; NaN becomes null, and values of other types their text."""
    from memcircuits.base.json_values import readable_value

    objects = frame.select_dtypes(exclude=["number", "bool", "datetime", "datetimetz"])
    plain = frame.assign(**{str(name): objects[name].map(readable_value) for name in objects})
    text = plain.to_json(orient="records", double_precision=10, date_format="iso")
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def with_heads(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with one column `head` (`L0H5`) in place of `layer` and `head`.

    Where a row has no head, as that of an MLP, its layer is named: `L0`.
    """
    import pandas as pd
    from pandas.api.types import is_numeric_dtype

    if not {"layer", "head"} <= set(frame.columns) or not is_numeric_dtype(frame["head"]):
        return frame
    places = [
        None if pd.isna(layer) else f"L{layer}" if pd.isna(head) else f"L{layer}H{int(head)}"
        for layer, head in zip(frame["layer"], frame["head"].astype(object), strict=True)
    ]
    return frame.assign(head=places).drop(columns="layer")


def print_table(frame: pd.DataFrame) -> None:
    """Print a table on stdout, numbers with four digits, the most important columns first.

    It is as wide as the terminal, or 80 characters. Columns that do not fit are named below it.
    """
    from rich.console import Console

    width = Console().width if sys.stdout.isatty() else _piped_width()
    frame = with_heads(frame)
    cells = {str(name): [_cell(value) for value in frame[name]] for name in frame.columns}
    shown = _that_fit(cells, width)
    page = io.StringIO()
    console = Console(file=page, width=width, color_system=None, highlight=False)
    console.print(_rich_table(frame, shown))
    typer.echo("\n".join(line.rstrip() for line in page.getvalue().splitlines()))
    left_out = ", ".join(name for name in cells if name not in shown)
    if left_out:
        typer.echo(textwrap.fill(f"Not shown: {left_out} (--json has all columns).", width))


def _piped_width() -> int:
    """The columns of a pipe or a file: what COLUMNS says, as in other programs, else 80."""
    given = os.environ.get("COLUMNS", "")
    return max(int(given), PIPED_WIDTH // 2) if given.isdigit() else PIPED_WIDTH


def _cell(value: Any) -> str:
    """The text of a cell in one line, invisible characters spelled out; a dash if it is missing."""
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return UNKNOWN
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{value:.4g}"
    return clean(" ".join(str(value).split()))


def _that_fit(cells: Mapping[str, Sequence[str]], width: int) -> dict[str, list[str]]:
    """The first columns that fit into the width; the last of them may be cut.

    Where there is a column `text`, the width that it needs at least is kept for it.
    """
    from rich.cells import cell_len, set_cell_size

    shown: dict[str, list[str]] = {}
    available = width
    reserved = _SHORTEST_TEXT + _GAP if "text" in cells else 0
    for name, column in cells.items():
        natural = max(map(cell_len, (name, *column)))
        if name == "text":
            reserved = 0
        if natural <= available - reserved:
            shown[name] = list(column)
            available -= natural + _GAP
            continue
        if reserved:
            continue
        if not shown or available >= max(_SHORTEST_TEXT, cell_len(name)):
            shown[name] = [
                text if cell_len(text) <= available else set_cell_size(text, available - 1) + "…"
                for text in column
            ]
        break
    return shown


def _rich_table(frame: pd.DataFrame, cells: Mapping[str, Sequence[str]]) -> Table:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for name in cells:
        is_number = is_numeric_dtype(frame[name]) and not is_bool_dtype(frame[name])
        # Text: brackets in names are no markup.
        table.add_column(Text(name), justify="right" if is_number else "left", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    return table
