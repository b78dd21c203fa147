"""Arrays as charts need them: on the CPU, two-dimensional, without infinities."""

from __future__ import annotations

from typing import Any

import numpy as np

from memcircuits.core.errors import InputError


def array(values: Any) -> np.ndarray:
    """Any tensor, array or nested list as float64 in memory."""
    if hasattr(values, "detach"):  # a torch tensor, perhaps bfloat16 on a GPU
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=float)


def matrix(values: Any, argument: str = "values") -> np.ndarray:
    """A [row, col] array; NaN is allowed and means not measured.

    Raises:
        InputError: it is empty, has other axes, or holds infinities.
    """
    found = array(values)
    if found.ndim != 2 or 0 in found.shape:
        raise InputError(argument, f"shape {found.shape}", "give a non-empty [row, col] array")
    if np.isinf(found).any():
        raise InputError(argument, "infinite", "give finite numbers, NaN for not measured")
    return found


def cells(marks: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Marked cells, given as pairs (row, col) or as booleans of the matrix' shape.

    Raises:
        InputError: a pair lies outside the matrix.
    """
    found = np.asarray(marks.cpu() if hasattr(marks, "cpu") else marks)
    if found.dtype == bool and found.shape == shape:
        found = np.argwhere(found)
    pairs = [(int(row), int(col)) for row, col in found.reshape(-1, 2)]
    for row, col in pairs:
        if not (0 <= row < shape[0] and 0 <= col < shape[1]):
            raise InputError("marks", (row, col), f"give cells of the {shape} matrix")
    return pairs
