"""Where do the weights hold it? Gradients of the continuation's loss, per layer, matrix and head.

Equation 2 of the paper: the score of a component is the largest |dL/dtheta| over its weights, L the
mean NLL over paragraphs of the continuation tokens; W_Q, W_K, W_V and W_O are split by head,
W_in, W_out (and W_gate) are taken per layer. `pool="l2"` gives layerwise gradient norms.
Embeddings, unembedding, norms and biases are left out.

Two routes to a gradient:

* of the mean over paragraphs (the paper): one backward pass per batch (`mean_gradient`);
* of every paragraph by itself (`paragraph_gradients`): a weight matrix sees x and answers y, so paragraph
  p's gradient is the product of its own x and dL/dy over positions, and one forward and backward
  pass of the whole batch gives all of them.

Equation 3 sets memorized paragraphs against controls: KL(original || current) on the controls minus
NLL on the memorized. At the original weights, where the paper takes its mask, the KL is zero and at
its minimum, so its gradient vanishes exactly: the objective's gradient there *is* that of the NLL,
and the controls have no say. What the KL does have there is curvature, KL = 1/2 d^T F d for a small
change d, with F the Fisher information on the controls. Raising the NLL for the least KL means
d_i ~ g_i / F_i, and weight i then contributes g_i^2 / F_i, so `contrastive_gradients` scores a
weight by |g| / sqrt(F + damping) (`curvature=False`: |g|, the paper's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, one_of
from memcircuits.core.statistics import left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.gradients import mean_gradient, paragraph_gradients
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.registry import adapt
from memcircuits.models.weights import HEAD_COMPONENTS, Weight
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


POOLS = ("max", "mean", "l2")


STATISTICS = ("sum", "variance", "max")


@dataclass(frozen=True)
class ParameterGradients(Result, kind="parameter-gradients"):
    """Pooled |gradient| of each component.

    Attributes:
        values: component -> [layer, head]; W_in, W_out and W_gate have one column; W_K and W_V of
            grouped-query models one per key-value head.
        pool: how weights were pooled.
        loss: mean NLL of the paragraphs, nats/token.
        provenance: where the numbers come from.
        objective: `nll` or `contrastive`.
        units: units of `values`.
        samples: component -> [paragraph, layer, head], where every paragraph has its own gradient;
            `values` is their mean.
        statistics: component -> [statistic, layer, head], the sum of |g|, the variance of g and the
            maximum of |g| over the component's weights (`STATISTICS`).
        cosine: component -> [layer, head], cosine between the NLL gradients of memorized and
            control paragraphs (contrastive objective only).
        notes: what the reader must know.
    """

    values: Mapping[str, Float[Tensor, "layer head"]]
    pool: str
    loss: float
    provenance: Provenance
    objective: str = "nll"
    units: str = "nats/token per unit of weight"
    samples: Mapping[str, Float[Tensor, "paragraph layer head"]] = field(default_factory=dict)
    statistics: Mapping[str, Float[Tensor, "statistic layer head"]] = field(default_factory=dict)
    cosine: Mapping[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        """Largest value over W_Q, W_K, W_V, W_O; key-value heads count for all their heads.

        Raises:
            InputError: if none of them was measured.
        """
        rows = [self.values[name] for name in HEAD_COMPONENTS if name in self.values]
        if not rows:
            raise InputError("components", list(self.values), "measure W_Q, W_K, W_V or W_O")
        return torch.stack([v.repeat_interleave(n_heads // v.shape[1], 1) for v in rows]).amax(0)

    def to_frame(self) -> pd.DataFrame:
        """Columns `component, layer, head, value`, the statistics and, where known, `cosine`.

        `head` is empty for MLP matrices.
        """
        import pandas as pd

        rows = [
            {
                "component": name,
                "layer": layer,
                "head": head if name in HEAD_COMPONENTS else None,
                "value": float(values[layer, head]),
                **{
                    statistic: float(self.statistics[name][i, layer, head])
                    for i, statistic in enumerate(STATISTICS if self.statistics else ())
                },
                **({"cosine": float(self.cosine[name][layer, head])} if self.cosine else {}),
            }
            for name, values in self.values.items()
            for layer in range(values.shape[0])
            for head in range(values.shape[1])
        ]
        frame = pd.DataFrame(rows)
        frame["head"] = frame["head"].astype("Int64")
        return frame

    def figure(self) -> Any:
        """The map of figure 4 (plotly)."""
        from memcircuits.display import figures

        title = f"{self.pool} |gradient| of the {self.objective} objective"
        return figures.gradient_map(self.to_frame(), title=title, units=self.units)

    def __str__(self) -> str:
        return f"{self.pool} {self.objective} gradients, lower-half share {self.layer_share():.3f}"


def parameter_gradients(
    model: Any,
    paragraphs: Any,
    *,
    pool: str = "max",
    average: str = "batch",
    per_loss: bool = False,
    components: Sequence[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the NLL of the continuations, pooled per component.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        pool: `max`, `mean` or `l2` over the weights of a component.
        average: `batch` pools the gradient of the mean loss (the paper); `paragraph` pools each
            paragraph's own gradient and averages after that, so that paragraphs cannot cancel.
        per_loss: divide by the loss (the paragraph's own with `average="paragraph"`). Gradients
            grow with the loss, and controls have far more of it than memorized paragraphs.
        components: names of the matrices, by default `W_Q`, `W_K`, `W_V`, `W_O` of the heads and
            `W_in`, `W_out` (and `W_gate`) of the MLPs; fewer are quicker.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` in nats/token per unit of weight (with `per_loss` 1 per unit).

    Raises:
        InputError: for a wrong pool, average or component, or unusable paragraphs.

    Example:
        >>> found = mc.parameter_gradients(model, memorized)
        >>> sorted(found.values)
        ['W_K', 'W_O', 'W_Q', 'W_V', 'W_in', 'W_out']
        >>> found.layer_share() > 0.5  # more than half of it in the lower half of the layers
        True
    """
    one_of("pool", pool, POOLS)
    one_of("average", average, ("batch", "paragraph"))
    adapter = adapt(model)
    if components is not None:
        if isinstance(components, str) or not components:
            raise InputError("components", repr(components), "give a list of names")
        for component in components:
            one_of("components", component, adapter.components)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    weights = adapter.weights(components)

    def measure() -> tuple[Float[Tensor, " loss"], list[Tensor]]:
        if average == "batch":
            loss, gradients = mean_gradient(adapter, paragraphs, weights, memory_budget, progress)
            summaries = [
                summarize(w.split(g), pool) for w, g in zip(weights, gradients, strict=True)
            ]
            return torch.tensor([loss]), [summary[None] for summary in summaries]
        return paragraph_gradients(
            adapter, paragraphs, weights, lambda _, g: summarize(g, pool), memory_budget, progress
        )

    losses, rows = measure()
    notes: tuple[str, ...] = ()
    if not losses.isfinite().all():
        finite = has_finite_scores(adapter, paragraphs, "paragraphs", memory_budget)
        paragraphs, notes = paragraphs[finite], left_out(finite)
        losses, rows = measure()
    if not all(row.isfinite().all() for row in rows):
        raise InputError("model", "non-finite gradients", "load it in float32, check its weights")
    if per_loss:
        power = torch.tensor([1.0, *(2.0 if name == "variance" else 1.0 for name in STATISTICS)])
        scale = losses.clamp_min(1e-12)[:, None] ** power
        rows = [row.cpu() / scale[:, :, None] for row in rows]
    tables = by_component(weights, rows)
    return ParameterGradients(
        values={name: table[:, 0].mean(0) for name, table in tables.items()},
        pool=pool,
        loss=float(losses.mean()),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            pool=pool,
            average=average,
            per_loss=per_loss,
            components=components and list(components),
        ),
        units="1 per unit of weight" if per_loss else "nats/token per unit of weight",
        samples={}
        if average == "batch"
        else {name: table[:, 0].contiguous() for name, table in tables.items()},
        statistics={name: table[:, 1:].mean(0) for name, table in tables.items()},
        notes=notes,
    )


def summarize(gradient: Float[Tensor, "... d_in d_out"], pool: str) -> Float[Tensor, "... k head"]:
    """The pooled value and the statistics, stacked before the head axis.

    Sums over a whole matrix run at the speed of memory, so the variance is that of mean squares.
    """
    gradient, matrix = gradient.float(), (-2, -1)
    size = gradient.abs()
    largest, mean = size.amax(matrix), size.mean(matrix)
    power = gradient.square().mean(matrix)
    n = gradient.shape[-2] * gradient.shape[-1]
    pooled = {"max": largest, "mean": mean, "l2": (n * power).sqrt()}[pool]
    variance = (power - gradient.mean(matrix).square()).clamp_min(0.0)
    return torch.stack([pooled, n * mean, variance, largest], dim=-2)


def by_component(
    weights: Sequence[Weight], rows: Sequence[Tensor]
) -> dict[str, Float[Tensor, "sample k layer head"]]:
    tables: dict[str, list[Tensor]] = {}
    for weight, row in zip(weights, rows, strict=True):
        tables.setdefault(weight.component, []).append(row.float().cpu())
    return {name: torch.stack(parts, dim=2) for name, parts in tables.items()}
