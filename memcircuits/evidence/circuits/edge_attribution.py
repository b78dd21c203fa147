"""Edge attribution with integrated gradients: the effect of removing every edge, estimated at once.

Removing the edge from u to v changes what v reads by (output of u on the reference - its output on
the paragraph). To first order the NLL rises by

    sum over positions of u: (change) . d NLL / d (what v reads)

with the gradient through v alone (Syed, Rager and Conmy 2023, arXiv 2310.10348). On recited text
each token's probability is near 1 and the gradient near 0. The gradient is therefore averaged over
inputs on the straight line between the embedded reference and the embedded paragraph (midpoint
rule): EAP-IG (Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806).

One forward and one backward pass on all points give d NLL / d (output of v). One backward pass
through the attention or the MLP of one layer for each node then gives d NLL / d (what v reads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.evidence.circuits.edge_runs import EdgeRuns
from memcircuits.models.hooks import hook_name


@dataclass(frozen=True)
class _Points:
    """The model at some points on the way, and the gradients of their summed NLL.

    Attributes:
        resid_pre: what enters each block.
        attn_out: the output of each attention.
        gradients: gradient in each activation `z` and `mlp_out`, by name.
        final: gradient in what leaves the last block.
    """

    resid_pre: list[Float[Tensor, "point pos d_model"]]
    attn_out: list[Float[Tensor, "point pos d_model"]]
    gradients: dict[str, Tensor]
    final: Float[Tensor, "point pos d_model"]


def attribute_edges(
    runs: EdgeRuns, steps: int, done: Callable[[int], None] | None = None
) -> Float[Tensor, "reference source target"]:
    """Estimated rise of the NLL (nats/token) without each edge; NaN where there is no edge.

    Args:
        runs: the paragraph and the references.
        steps: number of points on the way; 1 is the point in the middle.
        done: called with 1 after each reference.
    """
    scores = []
    for reference in range(len(runs.reference)):
        scores.append(_of_reference(runs, reference, steps))
        if done is not None:
            done(1)
    return torch.stack(scores)


def _of_reference(runs: EdgeRuns, reference: int, steps: int) -> Float[Tensor, "source target"]:
    graph, adapter = runs.graph, runs.adapter
    scores = torch.full(graph.edges.shape, torch.nan)
    removed = runs.reference[reference] - runs.clean  # [component, pos, d_model]
    points = _points(runs, reference, steps)

    def put(node: int, gradient: Float[Tensor, "point pos d_model"]) -> None:
        n_read = graph.n_read(node // 2)
        of_position = torch.einsum("cpm,pm->cp", removed[:n_read], gradient.mean(0))
        of_class = of_position @ runs.in_class.to(of_position.dtype).T
        scores[: 2 * n_read, node] = of_class.flatten().float().cpu()

    for layer in range(graph.n_layers):
        resid = points.resid_pre[layer].detach().requires_grad_()
        heads, mlp = graph.heads(layer), graph.mlp(layer)
        with torch.enable_grad():
            z = adapter.read_z(layer, resid)
            mlp_out = runs.mlp_output(layer, resid, points.attn_out[layer].detach())
        for node in range(2 * heads.start, 2 * heads.stop):
            weights = torch.zeros_like(z)
            place = (slice(None), runs.in_class[node % 2], node // 2 - heads.start)
            weights[place] = points.gradients[hook_name("z", layer)][place]
            put(node, torch.autograd.grad(z, resid, weights, retain_graph=True)[0])
        for node in (2 * mlp, 2 * mlp + 1):
            gradient = points.gradients[hook_name("mlp_out", layer)].view(mlp_out.shape)
            weights = gradient * runs.in_class[node % 2][:, None]
            put(node, torch.autograd.grad(mlp_out, resid, weights, retain_graph=True)[0])
    put(2 * graph.logits + 1, points.final)
    return scores.masked_fill(~graph.edges, torch.nan)


def _points(runs: EdgeRuns, reference: int, steps: int) -> _Points:
    """Run the model at the points on the way, forward and backward."""
    adapter = runs.adapter
    names = [hook_name(s, i) for s in ("z", "mlp_out") for i in range(adapter.n_layers)]
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def hook(activation: Tensor) -> Tensor:
            kept[name] = activation
            return activation  # what follows is computed from this tensor

        return hook

    at = (torch.arange(steps, device=adapter.device) + 0.5) / steps
    start, end = runs.embedded[1 + reference], runs.embedded[0]
    with torch.enable_grad():
        resid = torch.lerp(start, end, at.to(start.dtype).view(-1, 1, 1)).requires_grad_()
        with adapter.recording() as recorded:
            final = adapter.run_blocks(0, resid, edit={name: keep(name) for name in names})
        activations = [*(kept[name] for name in names), final]
        *gradients, of_final = torch.autograd.grad(runs.nll(final).sum(), activations)
    return _Points(
        # The last ones: the first call at a length runs the model on a row of its own before.
        recorded.resid_pre[-adapter.n_layers :],
        recorded.attn_out[-adapter.n_layers :],
        dict(zip(names, gradients, strict=True)),
        of_final,
    )
