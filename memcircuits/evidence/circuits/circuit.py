"""Which paths between heads and MLPs carry the recitation of one paragraph?

1. References are other texts at the same positions, by default the paragraph's own tokens in random
   orders: the same words, without what there is to recite.
2. The effect of removing every edge is estimated (`edge_attribution`), averaged over references.
3. A circuit of n edges has the n with the largest estimates by absolute value among those that lie
   on a path from the embedding to the logits (`graph`).
4. It is run by itself: what other edges carry comes from the reference (`edge_runs`). It is
   *faithful* to the extent that it restores the loss,

       faithfulness = (NLL on the reference - NLL of the circuit)
                      / (NLL on the reference - NLL on the paragraph),

   1 with all edges and 0 with none. Circuits of several sizes are compared with random ones of as
   many edges on paths, in a random order instead of that of the estimates.
5. The smallest circuit that reaches the faithfulness asked for is found by bisection, which assumes
   that more edges are more faithful.
6. The estimates of its first edges are checked by exact path patching of each.

The estimate uses gradients as EAP-IG does (Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, UnsupportedModel, at_least, fraction
from memcircuits.base.progress import bar
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.circuits.edge_attribution import attribute_edges
from memcircuits.evidence.circuits.edge_runs import EdgeRuns
from memcircuits.evidence.circuits.graph import Edges
from memcircuits.evidence.circuits.results import RecitationCircuit
from memcircuits.evidence.lookups.driving import refuse_other_blocks
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

_N_SIZES = 8  # of the circuits that are compared with random ones
_SMALLEST = 10  # edges
_PRECISION = 0.05  # of the size that bisection finds, as a share of it


@plain_torch()
def recitation_circuit(  # noqa: PLR0913 (keyword-only options of a public function)
    model: Model,
    paragraph: ParagraphsLike,
    *,
    reference: ParagraphsLike | None = None,
    faithfulness: float = 0.8,
    draws: int = 4,
    steps: int = 5,
    verify: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> RecitationCircuit:
    """Find the edges between heads and MLPs that the recitation of a paragraph depends on.

    Args:
        model: the model.
        paragraph: one paragraph, such as `scan.memorized[0]`.
        reference: texts of the same length that removed edges carry; by default, the paragraph's
            tokens in random orders.
        faithfulness: share of the loss's difference that the circuit restores, in (0, 1].
        draws: number of random orders, and of random circuits of each size.
        steps: number of points on the way from the reference where gradients are taken.
        verify: number of the circuit's edges that are patched exactly, the first ones.
        seed: seed of all random draws.
        progress: show a bar on stderr.

    Returns:
        A `RecitationCircuit`: its edges, their effects (nats/token), and how faithful circuits of
        several sizes are.

    Raises:
        InputError: for an option out of range, more than one paragraph, a reference of another
            length, or one on which the continuation is as likely as on the paragraph.
        UnsupportedModel: if the model's blocks or logits are not sums over components, or it cannot
            be continued in the middle.

    Example:
        >>> circuit = mc.recitation_circuit(model, memorized[0], draws=1, steps=2, verify=1)
        >>> circuit.to_frame().columns[:4].tolist()
        ['rank', 'source', 'source_positions', 'target']
    """
    fraction("faithfulness", faithfulness)
    for name, value, least in (("draws", draws, 1), ("steps", steps, 1), ("verify", verify, 0)):
        at_least(name, value, least)
    at_least("seed", seed, 0)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraph, adapter, "paragraph")
    if len(paragraphs) != 1:
        raise InputError(
            "paragraph", f"{len(paragraphs)} paragraphs", "give one, such as paragraphs[0]"
        )
    adapter.check_tokens(paragraphs.inputs, "paragraph")
    generator = torch.Generator().manual_seed(seed)
    given = None if reference is None else Paragraphs.of(reference, adapter, "reference")
    reference_ids = _reference_ids(adapter, paragraphs, given, draws, generator)
    with adapter.preserving_state():
        refuse_other_blocks(adapter, paragraphs)
        if not adapter.supports_partial_forward:
            raise UnsupportedModel("model", adapter.label, "it cannot be continued in the middle")
        search = _Search(EdgeRuns(adapter, paragraphs, reference_ids), faithfulness, draws)
        search.estimate(steps, progress)
        measured = search.measure(verify, generator, progress)
    return RecitationCircuit(
        **measured,
        name=paragraphs.names[0],
        provenance=Provenance.of(
            adapter,
            {"paragraph": paragraphs, "reference": given},
            faithfulness=faithfulness,
            draws=draws,
            steps=steps,
            verify=verify,
            seed=seed,
        ),
    )


def _reference_ids(
    adapter: Adapter,
    paragraph: Paragraphs,
    reference: Paragraphs | None,
    draws: int,
    generator: torch.Generator,
) -> Int[Tensor, "reference pos"]:
    """The ids of the references, without the tokens in front."""
    ids = paragraph.ids[0]
    if reference is None:
        orders = [torch.randperm(len(ids), generator=generator) for _ in range(draws)]
        return torch.stack([ids[order] for order in orders])
    if reference.ids.shape[1] != len(ids):
        raise InputError("reference", repr(reference), "use paragraphs of the same length")
    paragraph.check_same_bos(reference, "reference")
    adapter.check_tokens(reference.inputs, "reference")
    return reference.ids


class _Search:
    """Circuits of one paragraph: ordered, run, and compared with random ones."""

    def __init__(self, runs: EdgeRuns, goal: float, draws: int) -> None:
        self._runs, self._graph = runs, runs.graph
        self._goal, self._draws = goal, draws
        clean, *self._reference = runs.clean_and_reference_nll().tolist()
        self._clean = clean
        self._range = sum(self._reference) / len(self._reference) - clean
        if not self._range > 0:
            raise InputError(
                "reference",
                f"its NLL is {self._range + clean:.3g}, that of the paragraph {clean:.3g} "
                "nats/token",
                "give a reference on which the continuation is less likely",
            )

    def estimate(self, steps: int, progress: bool) -> None:
        """Estimate the effect of every edge, and put all edges in their order."""
        n = len(self._reference)
        with bar(n, "edges", unit="reference", progress=progress) as progress_bar:
            self._scores = attribute_edges(self._runs, steps, progress_bar.update)
        size = self._scores.mean(0).abs()
        places = self._graph.edges.nonzero()
        of_edges = size[places[:, 0], places[:, 1]]
        self._order = places[of_edges.argsort(descending=True, stable=True)]

    def measure(self, verify: int, generator: torch.Generator, progress: bool) -> dict[str, Any]:
        """Run circuits of several sizes, choose one, and patch its first edges."""
        n_edges = len(self._order)
        smallest = min(_SMALLEST, n_edges)
        sizes = torch.logspace(0, 1, _N_SIZES, base=n_edges / smallest) * smallest
        sizes = sizes.round().long().unique().tolist()
        shuffled = [
            self._order[torch.randperm(n_edges, generator=generator)] for _ in range(self._draws)
        ]
        total = len(sizes) * (1 + len(shuffled)) + verify
        with bar(total, "circuits", unit="run", progress=progress) as progress_bar:
            curve, random = [], []
            for size in sizes:
                curve.append(self._faithfulness(self._graph.circuit(self._order, size)))
                circuits = [self._graph.circuit(order, size) for order in shuffled]
                random.append([self._faithfulness(circuit) for circuit in circuits])
                progress_bar.update(1 + len(shuffled))
            kept = self._smallest(sizes, curve)
            first = [edge for edge in self._order.tolist() if kept[tuple(edge)]][:verify]
            exact = torch.full_like(self._scores, torch.nan)
            for source, target in first:
                exact[:, source, target] = self._patch(source, target)
                progress_bar.update(1)
        return {
            "scores": self._scores,
            "exact": exact,
            "kept": kept,
            "nll": torch.tensor([self._clean, *self._reference]),
            "circuit_nll": self._runs.run(kept).cpu(),
            "sizes": torch.tensor(sizes),
            "curve": torch.tensor(curve),
            "random": torch.tensor(random),
            "n_layers": self._graph.n_layers,
            "n_heads": self._graph.n_heads,
        }

    def _faithfulness(self, edges: Edges) -> float:
        nll = float(self._runs.run(edges).mean())
        return 1 - (nll - self._clean) / self._range

    def _smallest(self, sizes: list[int], curve: list[float]) -> Edges:
        """The smallest circuit that is faithful enough, between two sizes of the curve."""
        reached = [i for i, value in enumerate(curve) if value >= self._goal]
        # All edges are faithful, up to rounding.
        i = reached[0] if reached else len(sizes) - 1
        few, enough = (sizes[i - 1] if i else 0), sizes[i]
        while enough - few > max(1, _PRECISION * enough):
            size = (few + enough) // 2
            circuit = self._graph.circuit(self._order, size)
            if self._faithfulness(circuit) >= self._goal:
                enough = size
            else:
                few = size
        return self._graph.circuit(self._order, enough)

    def _patch(self, source: int, target: int) -> Float[Tensor, " reference"]:
        """Exact rise of the NLL without one edge."""
        edges = self._graph.edges.clone()
        edges[source, target] = False
        return (self._runs.run(edges) - self._clean).cpu()
