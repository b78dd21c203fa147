"""Where do the weights hold it? Gradients of the continuation's loss, per layer, matrix and head.

Equation 2 of the paper: the score of a component is the largest |dL/dtheta| over its weights, L the
mean NLL over paragraphs of the continuation tokens; W_Q, W_K, W_V and W_O are split by head,
W_in, W_out (and W_gate) are taken per layer. `pool="l2"` gives layerwise gradient norms.
Embeddings, unembedding, norms and biases are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.adapter import HEAD_COMPONENTS, Adapter, Weight, adapt
from memcircuits.checks import one_of
from memcircuits.measure import read_continuation
from memcircuits.memory import rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance, Result

if TYPE_CHECKING:
    import pandas as pd

POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max": lambda g: g.abs().amax((-2, -1)),
    "mean": lambda g: g.abs().mean((-2, -1)),
    "l2": lambda g: g.square().sum((-2, -1)).sqrt(),
}


@dataclass(frozen=True)
class ParameterGradients(Result, kind="parameter-gradients"):
    """Pooled |gradient| of each component.

    Attributes:
        values: component -> [layer, head]; W_in, W_out and W_gate have one column; W_K and W_V of
            grouped-query models one per key-value head.
        pool: how weights were pooled.
        loss: mean NLL of the paragraphs, nats/token.
        provenance: where the numbers come from.
    """

    values: Mapping[str, Float[Tensor, "layer head"]]
    pool: str
    loss: float
    provenance: Provenance

    @property
    def layers(self) -> Float[Tensor, " layer"]:
        """Sum over all components of a layer (for `l2`: the norm over all its weights)."""
        if self.pool == "l2":
            return sum(v.square().sum(-1) for v in self.values.values()).sqrt()  # type: ignore[union-attr]
        return sum(v.sum(-1) for v in self.values.values())  # type: ignore[return-value]

    def layer_share(self) -> float:
        """Share of the lower half of the layers in the sum over layers (paper, figure 4)."""
        layers = self.layers
        return float(layers[: len(layers) // 2].sum() / layers.sum())

    def per_head(self, n_heads: int) -> Float[Tensor, "layer head"]:
        """Largest value over W_Q, W_K, W_V, W_O; key-value heads count for all their heads."""
        rows = [self.values[name] for name in HEAD_COMPONENTS]
        return torch.stack([v.repeat_interleave(n_heads // v.shape[1], 1) for v in rows]).amax(0)

    def to_frame(self) -> pd.DataFrame:
        """Columns `component, layer, head, value`; `head` is empty for MLP matrices."""
        import pandas as pd

        rows = [
            (name, layer, head if name in HEAD_COMPONENTS else None, float(value))
            for name, values in self.values.items()
            for layer, row in enumerate(values)
            for head, value in enumerate(row)
        ]
        frame = pd.DataFrame(rows, columns=["component", "layer", "head", "value"])
        frame["head"] = frame["head"].astype("Int64")
        return frame

    def figure(self) -> Any:
        """The map of figure 4 (plotly)."""
        from memcircuits import figures

        return figures.gradient_map(self.to_frame())

    def __str__(self) -> str:
        return f"{self.pool} gradients, lower-half share {self.layer_share():.3f}"


def parameter_gradients(
    model: Any,
    paragraphs: Any,
    *,
    pool: str = "max",
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the batch-mean NLL of the continuations, pooled per component.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        pool: `max`, `mean` or `l2` over the weights of a component.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` in nats/token per unit of weight.

    Raises:
        InputError: for a wrong pool or unusable paragraphs.
    """
    one_of("pool", pool, POOLS)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    weights = all_weights(adapter)
    loss, gradients = mean_gradient(adapter, paragraphs, weights, memory_budget, progress)
    pooled: dict[str, list[Tensor]] = {}
    for weight, gradient in zip(weights, gradients, strict=True):
        pooled.setdefault(weight.component, []).append(POOLS[pool](weight.split(gradient)))
    return ParameterGradients(
        values={name: torch.stack(rows).float().cpu() for name, rows in pooled.items()},
        pool=pool,
        loss=loss,
        provenance=Provenance.of(adapter, {"paragraphs": paragraphs}, pool=pool),
    )


def all_weights(adapter: Adapter) -> list[Weight]:
    """The weight matrices of every block, layer by layer."""
    return [
        adapter.weight(layer, component)
        for layer in range(adapter.n_layers)
        for component in adapter.components
    ]


def mean_gradient(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: list[Weight],
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[float, list[Tensor]]:
    """Mean NLL over paragraphs, and its gradient for each weight's parameter.

    The caller's `.grad` and `requires_grad` stay as they are.
    """
    parameters = [weight.parameter for weight in weights]
    n = len(paragraphs)
    # Activations of all layers are kept for the backward pass.
    size = max(
        1,
        rows_that_fit(adapter, paragraphs.ids.shape[1], paragraphs.n_continuation, memory_budget)
        // adapter.n_layers,
    )
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    loss = 0.0
    positions = slice(paragraphs.n_prefix - 1, None)
    with (
        adapter.untouched(grad=parameters),
        bar(n, "gradients", progress=progress) as shown,
    ):
        for start in range(0, n, size):
            piece = slice(start, min(n, start + size))
            run = adapter.run(paragraphs.ids[piece, :-1], positions=positions)
            targets = paragraphs.continuation[piece].to(adapter.device)
            part = read_continuation(run.logits, targets).nll.sum() / n
            for total, gradient in zip(totals, torch.autograd.grad(part, parameters), strict=True):
                total += gradient
            loss += float(part.detach())
            shown.update(piece.stop - start)
    return loss, totals
