"""Charts as plain data, name of a block of the page and its settings: so they are saved as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import memcircuits as mc

Chart = tuple[str, dict[str, Any]]


def heatmap(
    title: str,
    values: Tensor,
    name: str,
    units: str,
    best: mc.Head | None = None,
    **settings: Any,
) -> Chart:
    """Layer x head, or what `row_label` and `col_label` among the settings say."""
    chart = {"title": title, "values": values.tolist(), "name": name, "units": units, **settings}
    if best is not None:
        chart |= {"marks": [list(best)], "marks_mean": "the head in the table"}
    return "Heatmap", chart


def component_map(
    title: str, values: Mapping[str, Tensor], name: str, units: str, note: str = ""
) -> Chart:
    """Layer x component x head, as figure 4: the heads of each component side by side.

    Args:
        title: title of the chart.
        values: component or site -> [layer, head]; one of the MLP has a single column.
        name: what the values are.
        units: their unit.
        note: how to read the chart.
    """
    columns = [
        f"{component} {head}" if of.shape[1] > 1 else component
        for component, of in values.items()
        for head in range(of.shape[1])
    ]
    every = torch.cat(list(values.values()), dim=1)
    labels = {"col_label": "component", "col_names": columns, "note": note}
    return heatmap(title, every, name, units, **labels)


def lines(
    title: str, points: Sequence[Mapping[str, Any]], x: str, y: str, **settings: Any
) -> Chart:
    """Lines through points; `by` among the settings names the series."""
    return "Lines", {"frame": list(points), "title": title, "x": x, "y": y, **settings}


def bars(title: str, points: Sequence[Mapping[str, Any]], x: str, y: str, **settings: Any) -> Chart:
    """Grouped bars; `by` among the settings names the groups."""
    return "Bars", {"frame": list(points), "title": title, "x": x, "y": y, **settings}
