"""A graph of components on a page: which one reads which, drawn from the bottom to the top.

Components of one row stand beside each other, once for each class of positions. A line is an edge,
the wider the larger its value. A script shows the edges of the node that the reader chooses, and as
many edges as the reader asks for; without it, all of them are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from memcircuits.base.errors import InputError
from memcircuits.display.pages.blocks import Block
from memcircuits.display.text import number

_ROW, _TOP, _SIDE = 64, 34, 8
_COLUMN = 46
_GAP = 40  # between the classes
_RADIUS = 7
_WIDEST, _NARROWEST = 6.0, 0.6

NodeName = tuple[str, str]
"""Component and class of positions."""


class GraphEdge(NamedTuple):
    """One edge: from a node to another, with a value."""

    source: NodeName
    target: NodeName
    value: float


@dataclass(frozen=True)
class EdgeGraph(Block):
    """Nodes in rows, once for each class, and edges between them.

    Attributes:
        rows: names of the components of each row, the lowest row first.
        classes: names of the classes, from left to right.
        edges: the edges, the most important first.
        name: what the values are.
        units: their unit.
        max_edges: maximum number of edges drawn; the page says how many are left out.
    """

    template: ClassVar[str] = "edge_graph.html.j2"
    scripts: ClassVar[tuple[str, ...]] = ("edge_graph",)
    rows: Sequence[Sequence[str]]
    classes: Sequence[str]
    edges: Sequence[GraphEdge]
    name: str = "value"
    units: str = ""
    max_edges: int = 400

    def __post_init__(self) -> None:
        """Check that there is something to draw, and that edges join nodes."""
        if not self.edges:
            raise InputError("edges", "none", "leave the block out: there is nothing to draw")
        nodes = {(name, of) for row in self.rows for name in row for of in self.classes}
        for edge in self.edges:
            for node in edge[:2]:
                if node not in nodes:
                    raise InputError("edges", repr(node), "name a component and a class")

    @property
    def _panel(self) -> int:
        """Width of the drawing of one class."""
        return max(len(row) for row in self.rows) * _COLUMN

    def _places(self) -> dict[NodeName, tuple[float, float]]:
        places = {}
        for i, row in enumerate(reversed(self.rows)):
            for j, name in enumerate(row):
                x = (j + 0.5) * self._panel / len(row)
                for k, of in enumerate(self.classes):
                    left = _SIDE + k * (self._panel + _GAP)
                    places[name, of] = (round(left + x, 1), _TOP + (i + 0.5) * _ROW)
        return places

    def context(self) -> dict[str, Any]:
        """Coordinates of nodes and edges."""
        places = self._places()
        drawn = self.edges[: self.max_edges]
        index = {node: i for i, node in enumerate(places)}
        used = {node for edge in drawn for node in edge[:2]}
        largest = max(abs(edge.value) for edge in drawn) or 1.0
        units = f" {self.units}" if self.units else ""
        n_classes = len(self.classes)
        return {
            "width": 2 * _SIDE + n_classes * self._panel + (n_classes - 1) * _GAP,
            "height": _TOP + len(self.rows) * _ROW,
            "radius": _RADIUS,
            "panels": [
                {"name": of, "x": _SIDE + (k + 0.5) * self._panel + k * _GAP}
                for k, of in enumerate(self.classes)
            ],
            "nodes": [
                {
                    "index": index[node],
                    "name": node[0],
                    "tip": f"{node[0]}, {node[1]}",
                    "x": x,
                    "y": y,
                    "used": node in used,
                }
                for node, (x, y) in places.items()
            ],
            "lines": [
                {
                    "source": index[edge.source],
                    "target": index[edge.target],
                    "start": places[edge.source],
                    "end": places[edge.target],
                    "width": round(max(_NARROWEST, _WIDEST * abs(edge.value) / largest), 1),
                    "colour": 0 if edge.value >= 0 else 1,
                    "tip": f"{edge.source[0]} ({edge.source[1]}) to {edge.target[0]} "
                    f"({edge.target[1]}): {number(edge.value)}{units}",
                }
                for edge in drawn
            ],
            "left_out": len(self.edges) - len(drawn),
        }
