"""The edges of a model: which component reads what which other component wrote, and where.

A *node* is a component at one class of positions: the *prefix*, or the *continuation*, which are
the positions that predict a continuation token (the last prefix token is the first of these).
Components are the embedding, the heads and the MLP of each layer, and the logits, in the order in
which they are computed; node 2 c is component c in the prefix, node 2 c + 1 in the continuation.

Every component adds to the residual stream, and every later one reads it at the same position: an
*edge*. A head reads it at earlier positions too, so that a head in the continuation has edges from
nodes in the prefix. The logits are read in the continuation only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PositionClass: TypeAlias = Literal["prefix", "continuation"]
"""The positions of a node."""

CLASSES: tuple[PositionClass, ...] = get_args(PositionClass)

Edges: TypeAlias = Bool[Tensor, "source target"]
"""Some of the edges, as a matrix of nodes."""


@dataclass(frozen=True)
class Graph:
    """The edges of a model.

    Attributes:
        n_layers: number of layers.
        n_heads: number of heads per layer.
        parallel: whether an MLP reads what enters its block, without the heads beside it.
    """

    n_layers: int
    n_heads: int
    parallel: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components: `embed`, `L0H0`, ..., `L0.mlp`, `L1H0`, ..., `logits`."""
        of_layers = [
            name
            for layer in range(self.n_layers)
            for name in (*(f"L{layer}H{head}" for head in range(self.n_heads)), f"L{layer}.mlp")
        ]
        return ("embed", *of_layers, "logits")

    @property
    def logits(self) -> int:
        """Index of the logits among the components."""
        return 1 + self.n_layers * (self.n_heads + 1)

    def heads(self, layer: int) -> slice:
        """Indices of the heads of a layer."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp(self, layer: int) -> int:
        """Index of the MLP of a layer."""
        return self.heads(layer).stop

    def n_read(self, component: int) -> int:
        """A component reads the components with smaller indices than this number."""
        layer, part = divmod(component - 1, self.n_heads + 1)
        is_mlp = part == self.n_heads
        if component == 0 or component == self.logits or (is_mlp and not self.parallel):
            return component
        return self.heads(layer).start

    @cached_property
    def edges(self) -> Edges:
        """All edges that lie on a path from the embedding to the logits.

        What the last layer writes in the prefix, nothing reads.
        """
        n = 2 * (self.logits + 1)
        edges = torch.zeros(n, n, dtype=torch.bool)
        for target in range(1, self.logits + 1):
            n_read = 2 * self.n_read(target)
            if target != self.logits:
                edges[0:n_read:2, 2 * target] = True
            edges[1:n_read:2, 2 * target + 1] = True
            if self._is_head(target):
                edges[0:n_read:2, 2 * target + 1] = True
        return self.connected(edges)

    def _is_head(self, component: int) -> bool:
        return 0 < component < self.logits and (component - 1) % (self.n_heads + 1) < self.n_heads

    def connected(self, edges: Edges) -> Edges:
        """The edges that lie on a path of edges from the embedding to the logits."""
        n = len(edges)
        from_embedding = torch.zeros(n, dtype=torch.bool)
        from_embedding[:2] = True
        for node in range(2, n):
            from_embedding[node] = (edges[:, node] & from_embedding).any()
        to_logits = torch.zeros(n, dtype=torch.bool)
        to_logits[-1] = True
        for node in range(n - 2, -1, -1):
            to_logits[node] = (edges[node] & to_logits).any()
        return edges & from_embedding[:, None] & to_logits[None, :]

    def circuit(self, order: Int[Tensor, "edge 2"], size: int) -> Edges:
        """The first edges of an order, as many as leave `size` edges or more on a path.

        Edges that lie on no path are left out, since they carry nothing to the logits.

        Args:
            order: pairs of source and target, all edges, the first ones first.
            size: number of edges, at most all of them.
        """
        few, enough = 0, len(order)  # more edges leave at least as many on a path
        while enough - few > 1:
            n = (few + enough) // 2
            if int(self.connected(self._first(order, n)).sum()) >= size:
                enough = n
            else:
                few = n
        return self.connected(self._first(order, enough))

    def _first(self, order: Int[Tensor, "edge 2"], n: int) -> Edges:
        edges = torch.zeros_like(self.edges)
        edges[order[:n, 0], order[:n, 1]] = True
        return edges

    def node_names(self) -> Iterator[tuple[str, PositionClass]]:
        """Component and positions of every node."""
        for name in self.names:
            for position_class in CLASSES:
                yield name, position_class
