"""`RecitationCircuit`: the edges that the recitation of a paragraph depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.evidence.circuits.graph import CLASSES, Graph
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block


@dataclass(frozen=True)
class RecitationCircuit(Result, kind="recitation-circuit"):
    """Edges between components, and circuits of them.

    Nodes are those of `memcircuits.evidence.circuits.graph`: 2 for each component, the first one in
    the prefix, the second one in the continuation.

    Attributes:
        scores: estimated rise of the NLL without each edge, nats/token, [reference, source,
            target]; NaN where there is no edge.
        exact: the same by exact path patching, NaN where it was not done.
        kept: the edges of the circuit, [source, target].
        nll: of the paragraph, then with the input of each reference, nats/token.
        circuit_nll: of the circuit, with each reference, nats/token.
        sizes: numbers of edges of the circuits that were compared with random ones.
        curve: their faithfulness.
        random: that of random circuits of these sizes, [size, draw].
        n_layers: number of layers.
        n_heads: number of heads per layer.
        name: the paragraph's name.
        provenance: where the numbers come from.
    """

    scores: Float[Tensor, "reference source target"]
    exact: Float[Tensor, "reference source target"]
    kept: Bool[Tensor, "source target"]
    nll: Float[Tensor, " text"]
    circuit_nll: Float[Tensor, " reference"]
    sizes: Int[Tensor, " size"]
    curve: Float[Tensor, " size"]
    random: Float[Tensor, "size draw"]
    n_layers: int
    n_heads: int
    name: str
    provenance: Provenance

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Names of the components: `embed`, the heads and the MLP of each layer, `logits`."""
        return Graph(self.n_layers, self.n_heads).names

    @property
    def n_edges(self) -> int:
        """Number of edges of the circuit."""
        return int(self.kept.sum())

    @property
    def faithfulness(self) -> float:
        """Share of the difference of the NLL that the circuit restores."""
        clean, reference = float(self.nll[0]), float(self.nll[1:].mean())
        return (reference - float(self.circuit_nll.mean())) / (reference - clean)

    def to_frame(self) -> pd.DataFrame:
        """One row per edge of the circuit, those with the largest absolute estimates first.

        Columns `rank`; `source, source_positions, target, target_positions`; `score`, the estimated
        rise of the NLL without the edge, with `score_low` and `score_high`, the smallest and the
        largest over the references; `exact`, the rise by path patching, empty where it was not
        done.
        """
        import pandas as pd

        edges = self._edges()
        scores = self.scores[:, edges[:, 0], edges[:, 1]].double()
        exact = self.exact[:, edges[:, 0], edges[:, 1]].double()
        data: dict[str, Any] = {"rank": range(1, len(edges) + 1)}
        for column, nodes in zip(("source", "target"), edges.T.tolist(), strict=True):
            data[column] = [self.components[node // 2] for node in nodes]
            data[f"{column}_positions"] = [CLASSES[node % 2] for node in nodes]
        data |= {
            "score": scores.mean(0).numpy(),
            "score_low": scores.amin(0).numpy(),
            "score_high": scores.amax(0).numpy(),
            "exact": exact.mean(0).numpy(),
        }
        return pd.DataFrame(data)

    def _edges(self) -> Int[Tensor, "edge 2"]:
        """Source and target of the edges of the circuit, the largest estimates first."""
        edges = self.kept.nonzero()
        size = self.scores.mean(0).abs()[edges[:, 0], edges[:, 1]]
        return edges[size.argsort(descending=True, stable=True)]

    def curve_frame(self) -> pd.DataFrame:
        """Faithfulness of circuits of several sizes, and of random circuits as large.

        Columns `edges, set` (`by attribution` or `random`), `faithfulness`, and `faithfulness_low`
        and `faithfulness_high`, the smallest and the largest of the random draws.
        """
        import pandas as pd

        rows = []
        for i, size in enumerate(self.sizes.tolist()):
            for name, values in (("by attribution", self.curve[[i]]), ("random", self.random[i])):
                rows.append(
                    {
                        "edges": size,
                        "set": name,
                        "faithfulness": float(values.mean()),
                        "faithfulness_low": float(values.min()),
                        "faithfulness_high": float(values.max()),
                    }
                )
        return pd.DataFrame(rows)

    def figure(self) -> Any:
        """Faithfulness against the number of edges, beside that of random circuits (plotly)."""
        from memcircuits.display import figures

        figure = figures.curves(
            self.curve_frame(),
            "edges",
            {"faithfulness": "faithfulness"},
            title=str(self),
            x_label="edges",
        )
        figure.update_xaxes(type="log")
        return figure

    def blocks(self) -> list[Block]:
        """The circuit as a graph, its edges as a table, and the faithfulness of other sizes."""
        from memcircuits.display.pages import EdgeGraph, GraphEdge, Lines, Table

        frame = self.to_frame()
        edges = [
            GraphEdge(
                (row.source, row.source_positions), (row.target, row.target_positions), row.score
            )
            for row in frame.itertuples()
        ]
        rows = [["embed"]]
        rows += [
            [*(f"L{i}H{head}" for head in range(self.n_heads)), f"L{i}.mlp"]
            for i in range(self.n_layers)
        ]
        return [
            EdgeGraph(
                [*rows, ["logits"]],
                CLASSES,
                edges,
                name="rise of the loss without the edge",
                units="nats/token",
                title="The circuit",
                note="From the embedding, below, to the logits, above; the wider a line, the more "
                "the loss changes without the edge.",
            ),
            Lines(
                self.curve_frame(),
                x="edges",
                y="faithfulness",
                by="set",
                low="faithfulness_low",
                high="faithfulness_high",
                log_x=True,
                title="How faithful are circuits of other sizes?",
                note="1: the loss of the whole model; 0: that on the reference. Bands: smallest "
                "and largest of the random circuits.",
            ),
            Table(
                frame,
                title="Edges",
                help={
                    "score": "estimated rise of the loss without the edge, nats/token",
                    "score_low": "the smallest over the references",
                    "score_high": "the largest over the references",
                    "exact": "rise of the loss by exact path patching, nats/token",
                },
            ),
        ]

    def __str__(self) -> str:
        n = int((~self.scores[0].isnan()).sum())
        return (
            f"{self.n_edges} of {n} edges restore {100 * self.faithfulness:.0f} % of the "
            f"recitation of {self.name}"
        )
