"""Progress bars on stderr: for work longer than a few seconds, silent in pipes and tests."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def bar(total: int | None, what: str, *, unit: str = "row", progress: bool = True) -> Any:
    """A tqdm bar with rate and remaining time; nothing is shown before one second has passed.

    Args:
        total: number of steps, None if it is not known.
        what: label.
        unit: name of one step.
        progress: False silences it; it is silent anyway where stderr is no terminal, except in
            notebooks.
    """
    with warnings.catch_warnings():  # a notebook without ipywidgets gets a bar of text
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm

    quiet = not progress or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(total=total, desc=what, unit=unit, disable=quiet, delay=1.0, leave=False)
