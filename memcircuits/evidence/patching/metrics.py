"""Metrics of patching: how well a run predicts the clean continuation.

Every metric reads the logits that predict the clean continuation and gives one number per pair. Let
y be the clean continuation, y' the corrupted one (what the model writes after the corrupted
prefix), and t the first token where they differ, the first impacted token:

| metric | formula | units |
| --- | --- | --- |
| `nll` | mean over i of -log p(y_i) | nats/token |
| `em` | greedy tokens equal to y before the first mismatch | tokens |
| `first_impacted` | -log p(y_t) | nats |
| `logit_diff` | logit(y_t) - logit(y'_t) | logits |

The last two need t, so every pair must have continuations that differ. A function of the caller
can be used as a metric too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.measure.continuation import Continuation, read_continuation

MetricName = Literal["nll", "em", "first_impacted", "logit_diff"]

CustomMetric = Callable[
    [Float[Tensor, "batch pos d_vocab"], Int[Tensor, " batch"]], Float[Tensor, " batch"]
]


@dataclass(frozen=True)
class MetricInputs:
    """What a metric may read about a batch of runs.

    Attributes:
        logits: the logits that predict the clean continuation.
        scores: per-token scores of the clean continuation under these logits.
        clean: the clean continuation.
        corrupted: the corrupted continuation.
        first_impacted: index of the first token where they differ.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    scores: Continuation
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    first_impacted: Int[Tensor, " batch"]

    def at_first_impacted(self, values: Tensor) -> Tensor:
        """`values` [batch, pos, ...] at each row's first impacted token."""
        return values[torch.arange(len(values), device=values.device), self.first_impacted]


def nll(inputs: MetricInputs) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of the clean continuation, nats/token."""
    return inputs.scores.nll


def em(inputs: MetricInputs) -> Float[Tensor, " batch"]:
    """Greedy tokens equal to the clean continuation before the first mismatch."""
    return inputs.scores.em.float()


def first_impacted(inputs: MetricInputs) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of the first impacted token of the clean continuation, nats."""
    return -inputs.at_first_impacted(inputs.scores.log_prob)


def logit_diff(inputs: MetricInputs) -> Float[Tensor, " batch"]:
    """Logit of the first impacted token minus that of the corrupted continuation's token there."""
    tokens = torch.stack([inputs.clean, inputs.corrupted], -1)
    logits = inputs.at_first_impacted(inputs.logits).float()
    clean, corrupted = logits.gather(-1, inputs.at_first_impacted(tokens)).unbind(-1)
    return clean - corrupted


class Metric(NamedTuple):
    """A metric and what is known about it.

    Attributes:
        function: computes it.
        units: its units.
        when_less_is_recited: the sign of a change after which less is recited.
        needs_first_impacted: whether it is defined only where the continuations differ.
    """

    function: Callable[[MetricInputs], Float[Tensor, " batch"]]
    units: str
    when_less_is_recited: int
    needs_first_impacted: bool = False


METRICS: dict[str, Metric] = {
    "nll": Metric(nll, "nats/token", 1),
    "em": Metric(em, "tokens", -1),
    "first_impacted": Metric(first_impacted, "nats", 1, needs_first_impacted=True),
    "logit_diff": Metric(logit_diff, "logits", -1, needs_first_impacted=True),
}

METRIC_UNITS = {name: metric.units for name, metric in METRICS.items()}


def effect_colours(metric: str) -> dict[str, Any]:
    """Options of a heatmap of effects: orange where less is recited, whatever the sign."""
    if metric not in METRICS:
        return {"name": "effect"}
    reverse = METRICS[metric].when_less_is_recited < 0
    return {"name": "effect (orange: less is recited)", "reverse": reverse}


@dataclass(frozen=True)
class PairMetrics:
    """The metrics of some pairs, computed together from logits (an `interventions.Measure`).

    Attributes:
        names: the metrics, the chosen one first.
        custom: the function behind the first name, if the caller gave one.
        clean: the clean continuations, on the model's device.
        corrupted: the corrupted continuations, likewise.
        first_impacted: index of the first token where they differ, likewise.
        start: index of the first of these pairs among all pairs.
    """

    names: tuple[str, ...]
    custom: CustomMetric | None
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    first_impacted: Int[Tensor, " batch"]
    start: int

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch metric"]:
        """All metrics of the runs with these logits.

        Args:
            logits: predict the clean continuation.
            rows: the pair that each row of `logits` belongs to, as an index into these pairs.

        Raises:
            InputError: if the caller's metric does not return one number per row.
        """
        clean = self.clean[rows]
        inputs = MetricInputs(
            logits=logits,
            scores=read_continuation(logits, clean),
            clean=clean,
            corrupted=self.corrupted[rows],
            first_impacted=self.first_impacted[rows],
        )
        columns = []
        names = list(self.names)
        if self.custom is not None:
            columns.append(custom_values(self.custom, logits, rows.cpu() + self.start))
            names = names[1:]
        columns += [METRICS[name].function(inputs) for name in names]
        return torch.stack(columns, -1)


def custom_values(
    metric: CustomMetric, logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The caller's metric, with its result checked.

    Raises:
        InputError: if it does not return one number per row of logits.
    """
    values = metric(logits, rows)
    if not isinstance(values, Tensor) or values.shape != (len(logits),):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError("metric", given, "return a tensor with one number per row of logits")
    return values.float()
