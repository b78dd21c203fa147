"""From the gradient of a weight matrix to a few numbers per head, and from these to maps of layers.

The score of a component is its pooled |gradient|: the largest over its weights in the paper, or the
mean or the L2 norm. Beside it stand statistics of the same gradient, from which figure 9 follows. A
`Summary` holds both, for all layers of one component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.models.weights import Weight

Pool: TypeAlias = Literal["max", "mean", "l2"]
"""The largest |gradient| over the weights of a component, their mean, or the L2 norm."""

STATISTICS = ("sum", "mean", "variance", "max", "min")
"""The sum of |g|; mean, variance, largest and smallest g over a component's weights."""


@dataclass(frozen=True)
class Summary:
    """The pooled gradient of one component in every layer, and its statistics.

    Attributes:
        pooled: pooled |gradient|, [sample, layer, head].
        statistics: see `STATISTICS`, [sample, statistic, layer, head].
    """

    pooled: Float[Tensor, "sample layer head"]
    statistics: Float[Tensor, "sample statistic layer head"]

    @property
    def mean_pooled(self) -> Float[Tensor, "layer head"]:
        """Mean of the pooled gradients over samples."""
        return self.pooled.mean(0)

    @property
    def mean_statistics(self) -> Float[Tensor, "statistic layer head"]:
        """Mean of the statistics over samples."""
        return self.statistics.mean(0)


def summarize(
    gradient: Float[Tensor, "*sample head d_in d_out"], pool: Pool
) -> Float[Tensor, "*sample number head"]:
    """The pooled value of each head, then its statistics, stacked before the head axis.

    One tensor, so that the summaries of several paragraphs can be concatenated;
    `layer_summaries` gives the numbers their names.
    """
    matrix = (-2, -1)
    gradient = gradient.float()
    magnitude = gradient.abs()
    n_weights = gradient.shape[-2] * gradient.shape[-1]
    largest, mean = magnitude.amax(matrix), magnitude.mean(matrix)
    signed_mean = gradient.mean(matrix)
    # Sums over whole matrices are bound by memory: the variance shares the mean square of `l2`.
    mean_square = gradient.square().mean(matrix)
    pooled = {"max": largest, "mean": mean, "l2": (n_weights * mean_square).sqrt()}[pool]
    variance = (mean_square - signed_mean.square()).clamp_min(0.0)
    extremes = [gradient.amax(matrix), gradient.amin(matrix)]
    return torch.stack([pooled, n_weights * mean, signed_mean, variance, *extremes], dim=-2)


def layer_summaries(
    weights: Sequence[Weight], summaries: Sequence[Float[Tensor, "sample number _"]]
) -> dict[str, Summary]:
    """Component -> its `Summary`, from what `summarize` gave for each weight."""
    tables = stack_layers(weights, summaries)
    return {name: Summary(table[:, 0], table[:, 1:]) for name, table in tables.items()}


def stack_layers(
    weights: Sequence[Weight], numbers: Sequence[Float[Tensor, "sample number _"]]
) -> dict[str, Float[Tensor, "sample number layer _"]]:
    """Component -> the numbers of its weights, layer by layer."""
    layers: dict[str, list[Tensor]] = {}
    for weight, of_weight in zip(weights, numbers, strict=True):
        layers.setdefault(weight.component, []).append(of_weight.float().cpu())
    return {name: torch.stack(of_layers, dim=2) for name, of_layers in layers.items()}
