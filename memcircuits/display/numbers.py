"""Arrays as charts need them: on the CPU, two-dimensional, without infinities."""

from __future__ import annotations

from typing import Any

import numpy as np

from memcircuits.base.errors import InputError


def array(values: Any) -> np.ndarray:
    """Any tensor, array or nested list as float64 in memory."""
    if hasattr(values, "detach"):  # a torch tensor, perhaps bfloat16 on a GPU
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=float)


def matrix(values: Any, argument: str = "values") -> np.ndarray:
    """A [row, col] array; NaN is allowed and means not measured.

    Raises:
        InputError: if it is empty, has other axes, or holds infinities.
    """
    entries = array(values)
    if entries.ndim != 2 or 0 in entries.shape:
        raise InputError(argument, f"shape {entries.shape}", "give a non-empty [row, col] array")
    if np.isinf(entries).any():
        raise InputError(argument, "infinite", "give finite numbers, NaN for not measured")
    return entries


def cells(marks: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Marked cells, given as pairs (row, col) or as booleans of the matrix' shape.

    Raises:
        InputError: if a pair lies outside the matrix.
    """
    marked = np.asarray(marks.cpu() if hasattr(marks, "cpu") else marks)
    if marked.dtype == bool and marked.shape == shape:
        marked = np.argwhere(marked)
    pairs = [(int(row), int(col)) for row, col in marked.reshape(-1, 2)]
    for row, col in pairs:
        if not (0 <= row < shape[0] and 0 <= col < shape[1]):
            raise InputError("marks", (row, col), f"give cells of the {shape} matrix")
    return pairs
