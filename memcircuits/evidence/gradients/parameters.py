"""Which weights would change the loss most? Gradients per layer, matrix and head (equation 2).

The score of a component is the largest |dL/dtheta| over its weights, where L is the mean NLL of the
continuation tokens over the paragraphs. W_Q, W_K, W_V and W_O are split by head; W_in, W_out and
W_gate are taken per layer. `pool="l2"` gives layerwise gradient norms. Embeddings, unembedding,
norms and biases are left out.

There are two ways to average (`Average`): the gradient of the mean loss (`batch`, the paper), from
one backward pass per batch (`memcircuits.measure.gradients.mean_gradient`), or the mean of the
pooled gradients of single paragraphs (`paragraph`), whose gradients then cannot cancel. The latter
need one forward and one backward pass per batch too, where every weight is applied by a module of
its own (`memcircuits.measure.gradients.paragraph_gradients`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import left_out
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.gradients.pooling import STATISTICS, Pool, layer_summaries, summarize
from memcircuits.measure.gradients import mean_gradient, paragraph_gradients
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.models.weights import HEAD_COMPONENTS
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

Average: TypeAlias = Literal["batch", "paragraph"]
"""Pool the gradient of the mean loss, or average the pooled gradients of single paragraphs."""

GradientObjective: TypeAlias = Literal["nll", "contrastive"]
"""Equation 2 (the loss on the paragraphs) or equation 3 (against controls)."""


@dataclass(frozen=True)
class ParameterGradients(Result, kind="parameter-gradients"):
    """Pooled |gradient| of each component.

    Attributes:
        values: component -> [layer, head]; W_in, W_out and W_gate have one column; W_K and W_V of
            grouped-query models one per key-value head.
        pool: see `Pool`.
        loss: mean NLL of the paragraphs, nats/token.
        provenance: where the numbers come from.
        objective: see `GradientObjective`.
        units: units of `values`.
        samples: component -> [paragraph, layer, head], where every paragraph has its own gradient;
            `values` is their mean.
        statistics: component -> [statistic, layer, head], see `STATISTICS`.
        cosine: component -> [layer, head], cosine between the NLL gradients of memorized and
            control paragraphs (contrastive objective only).
        notes: what the reader must know.
    """

    values: Mapping[str, Float[Tensor, "layer head"]]
    pool: Pool
    loss: float
    provenance: Provenance
    objective: GradientObjective = "nll"
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
        """Largest value over W_Q, W_K, W_V, W_O; a key-value head counts for each of its heads.

        Raises:
            InputError: if none of them was measured.
        """
        maps = [self.values[name] for name in HEAD_COMPONENTS if name in self.values]
        if not maps:
            raise InputError("components", list(self.values), "measure W_Q, W_K, W_V or W_O")
        maps = [values.repeat_interleave(n_heads // values.shape[1], 1) for values in maps]
        return torch.stack(maps).amax(0)

    def to_frame(self) -> pd.DataFrame:
        """Columns `component, layer, head, value`, the statistics and, where known, `cosine`.

        `head` is empty for MLP matrices.
        """
        import pandas as pd

        rows = []
        for name, values in self.values.items():
            columns = {"value": values}
            if self.statistics:
                columns |= dict(zip(STATISTICS, self.statistics[name], strict=True))
            if self.cosine:
                columns["cosine"] = self.cosine[name]
            for layer in range(values.shape[0]):
                for head in range(values.shape[1]):
                    row = {column: float(of[layer, head]) for column, of in columns.items()}
                    head_or_none = head if name in HEAD_COMPONENTS else None
                    rows.append({"component": name, "layer": layer, "head": head_or_none, **row})
        frame = pd.DataFrame(rows)
        frame["head"] = frame["head"].astype("Int64")
        return frame

    def component_statistics(self) -> pd.DataFrame:
        """Statistics over all layers and heads of a component (figure 9, upper rows).

        Returns:
            Columns `component, sum, variance, max, min`: the sum of |g|; the variance, the largest
            and the smallest g.
        """
        import pandas as pd

        rows = []
        for component, statistics in self.statistics.items():
            of = dict(zip(STATISTICS, statistics.double(), strict=True))
            # All heads of a component have as many weights: the law of total variance.
            variance = of["variance"].mean() + of["mean"].var(correction=0)
            numbers = (of["sum"].sum(), variance, of["max"].max(), of["min"].min())
            rows.append((component, *map(float, numbers)))
        return pd.DataFrame(rows, columns=["component", "sum", "variance", "max", "min"])

    def layer_sums(self) -> pd.DataFrame:
        """Sum of |g| over the weights of attention and of the MLP (figure 9, lower rows).

        Returns:
            Columns `layer, part, sum`; `part` is `attention` or `MLP`.
        """
        frame = self.to_frame()
        frame["part"] = frame["component"].isin(HEAD_COMPONENTS)
        frame["part"] = frame["part"].map({True: "attention", False: "MLP"})
        return frame.groupby(["layer", "part"], as_index=False)["sum"].sum()

    def figure(self) -> Any:
        """The map of figure 4 (plotly)."""
        from memcircuits.display import figures

        title = f"{self.pool} |gradient| of the {self.objective} objective"
        return figures.gradient_map(self.to_frame(), title=title, units=self.units)

    def __str__(self) -> str:
        return f"{self.pool} {self.objective} gradients, lower-half share {self.layer_share():.3f}"


@plain_torch()
def parameter_gradients(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    pool: Pool = "max",
    average: Average = "batch",
    per_loss: bool = False,
    components: Sequence[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the NLL of the continuations, pooled per component (equation 2 of the paper).

    Args:
        model: the model.
        paragraphs: the paragraphs.
        pool: `max`, `mean` or `l2` over the weights of a component.
        average: `batch` pools the gradient of the mean loss (the paper); `paragraph` pools each
            paragraph's own gradient and averages after that, so that paragraphs cannot cancel.
        per_loss: divide by the loss (the paragraph's own with `average="paragraph"`). Gradients
            grow with the loss, which is far larger on controls than on memorized paragraphs.
        components: names of the matrices, by default `W_Q`, `W_K`, `W_V`, `W_O` of the heads and
            `W_in`, `W_out` (and `W_gate`) of the MLPs; fewer are quicker.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` in nats/token per unit of weight (with `per_loss` 1 per unit).

    Raises:
        InputError: for a wrong pool, average or component, or unusable paragraphs.

    Example:
        >>> gradients = mc.parameter_gradients(model, memorized)
        >>> sorted(gradients.values)
        ['W_K', 'W_O', 'W_Q', 'W_V', 'W_in', 'W_out']
        >>> gradients.layer_share() > 0.5  # more than half of it in the lower half of the layers
        True
    """
    one_of("pool", pool, get_args(Pool))
    one_of("average", average, get_args(Average))
    adapter = adapt(model)
    _check_components(adapter, components)
    paragraphs = Paragraphs.of(paragraphs, adapter)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")

    # Measure; only if a number is not finite look for the paragraphs to leave out.
    samples = _Samples(adapter, components, pool, average, memory_budget, progress)
    losses, summaries = samples.measure(paragraphs)
    notes: tuple[str, ...] = ()
    if not losses.isfinite().all():
        finite = has_finite_scores(adapter, paragraphs, "paragraphs", memory_budget)
        paragraphs, notes = paragraphs[finite], left_out(finite)
        losses, summaries = samples.measure(paragraphs)
    if not all(summary.isfinite().all() for summary in summaries):
        raise InputError("model", "non-finite gradients", "load it in float32, check its weights")
    if per_loss:
        summaries = _divide_by_loss(summaries, losses)

    by_component = layer_summaries(samples.weights, summaries)
    own_samples = by_component if average == "paragraph" else {}
    return ParameterGradients(
        values={name: summary.mean_pooled for name, summary in by_component.items()},
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
        samples={name: summary.pooled.contiguous() for name, summary in own_samples.items()},
        statistics={name: summary.mean_statistics for name, summary in by_component.items()},
        notes=notes,
    )


def _check_components(adapter: Adapter, components: Sequence[str] | None) -> None:
    if components is None:
        return
    if isinstance(components, str) or not components:
        raise InputError("components", repr(components), "give a list of names")
    for component in components:
        one_of("components", component, adapter.components)


class _Samples:
    """Losses and summarized gradients: one sample of all paragraphs, or one of each."""

    def __init__(
        self,
        adapter: Adapter,
        components: Sequence[str] | None,
        pool: Pool,
        average: Average,
        memory_budget: int | None,
        progress: bool,
    ) -> None:
        self.adapter = adapter
        self.weights = adapter.weights(components)
        self.pool = pool
        self.average = average
        self.memory_budget = memory_budget
        self.progress = progress

    def measure(
        self, paragraphs: Paragraphs
    ) -> tuple[Float[Tensor, " sample"], list[Float[Tensor, "sample number _"]]]:
        """The loss of each sample and, for each weight, what `summarize` makes of its gradient."""
        if self.average == "paragraph":
            return paragraph_gradients(
                self.adapter,
                paragraphs,
                self.weights,
                lambda _, gradient: summarize(gradient, self.pool),
                self.memory_budget,
                self.progress,
            )
        loss, gradients = mean_gradient(
            self.adapter, paragraphs, self.weights, self.memory_budget, self.progress
        )
        summaries = [
            summarize(weight.split(gradient), self.pool)[None].to(self.adapter.device)
            for weight, gradient in zip(self.weights, gradients, strict=True)
        ]
        return torch.tensor([loss]), summaries


def _divide_by_loss(
    summaries: Sequence[Float[Tensor, "sample number _"]], losses: Float[Tensor, " sample"]
) -> list[Float[Tensor, "sample number _"]]:
    """Summaries per nat of loss; the variance, a square, is divided by the square of the loss."""
    powers = [2.0 if statistic == "variance" else 1.0 for statistic in STATISTICS]
    scale = losses.clamp_min(1e-12)[:, None] ** torch.tensor([1.0, *powers])
    return [summary.cpu() / scale[:, :, None] for summary in summaries]
