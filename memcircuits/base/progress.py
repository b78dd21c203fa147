"""Progress bars on stderr, for work that takes longer than a second.

A bar appears where somebody can see it: on a terminal or in a notebook. In pipes, logs and tests
nothing is written, and `progress=False` silences every bar.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any


def bar(total: int | None, what: str, *, unit: str = "row", progress: bool = True) -> Any:
    """A tqdm bar with rate and remaining time; it appears after one second.

    Args:
        total: number of steps; None if it is not known.
        what: label.
        unit: name of one step.
        progress: False silences the bar.
    """
    with warnings.catch_warnings():  # without ipywidgets, a notebook shows a bar of text
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm

    is_visible = sys.stderr.isatty() or "ipykernel" in sys.modules
    disable = not (progress and is_visible)
    return tqdm(total=total, desc=what, unit=unit, disable=disable, delay=1.0, leave=False)
