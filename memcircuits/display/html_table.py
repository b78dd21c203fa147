"""A table in a notebook: a few lines about it, then its first rows, with every text escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from memcircuits.display.text import clean, number

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 20


def table_html(frame: pd.DataFrame, lines: Iterable[str] = ()) -> str:
    """The first rows of a table below some lines, as HTML for `_repr_html_`.

    Numbers have four digits; columns of tensors or other objects show their text.
    """
    page = "".join(f"<p>{html.escape(clean(line))}</p>" for line in lines)
    shown = frame.head(MAX_ROWS)
    cells = {str(name): [_cell(value) for value in shown[name]] for name in shown.columns}
    head = "".join(f"<th>{html.escape(clean(name))}</th>" for name in cells)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(clean(text))}</td>" for text in row) + "</tr>"
        for row in zip(*cells.values(), strict=True)
    )
    page += f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if len(frame) > MAX_ROWS:
        page += f"<p>The first {MAX_ROWS} of {len(frame):,} rows.</p>"
    return page


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return number(float(value), 4) if np.isfinite(value) else str(value)
    return str(value)
