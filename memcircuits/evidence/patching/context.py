"""The two runs that activation patching compares, for every pair of prompts.

Both runs read the same continuation, the clean one, and differ in the prefix alone:

* the clean run reads the clean prefix and the clean continuation,
* the corrupted run reads the corrupted prefix and the clean continuation.

Activations of the *source* run are written into the *base* run. Noising patches the corrupted run's
activations into the clean run, denoising the clean run's into the corrupted one. Every metric is of
the clean continuation in both directions; the corrupted continuation only tells which token is the
first to be impacted, and which token the model writes in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import finite_rows, left_out
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.interventions import FALLBACK
from memcircuits.evidence.patching.metrics import (
    METRICS,
    CustomMetric,
    MetricName,
    PairMetrics,
)
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.hooks import Site, hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

Direction = Literal["noising", "denoising"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

Positions = Literal["changed"] | Sequence[int] | None

MAX_PAIRS_HELD = 16  # pairs whose activations are held at once


class PatchEffects(NamedTuple):
    """Effects of patches on every metric, and the metrics of the two unpatched runs.

    Attributes:
        values: metric of the patched run minus that of the base run, per pair, layer and unit (a
            head or a set of positions).
        base_metrics: metrics of the run patched into.
        source_metrics: metrics of the run that the activations come from.
    """

    values: Float[Tensor, "metric batch layer unit"]
    base_metrics: Float[Tensor, "batch metric"]
    source_metrics: Float[Tensor, "batch metric"]

    def masked(self) -> Float[Tensor, "metric batch layer unit"]:
        """The effects, NaN where any metric is not finite: an EM read there means nothing."""
        return self.values.where(self.values.isfinite().all(0), torch.nan)


@dataclass(frozen=True)
class PatchingContext:
    """Pairs of prompts, the direction of patching, and what is measured.

    Attributes:
        adapter: the model.
        clean: the clean prompts.
        corrupted: the corrupted prompts, row by row.
        direction: which of the two runs is patched.
        positions: positions that are patched, as the caller chose them.
        metric_names: the metrics, the chosen one first.
        custom_metric: the function behind the first name, if the caller gave one.
    """

    adapter: Adapter
    clean: Paragraphs
    corrupted: Paragraphs
    direction: Direction
    positions: Positions
    metric_names: tuple[str, ...]
    custom_metric: CustomMetric | None

    @classmethod
    def of(
        cls,
        model: Model,
        clean: ParagraphsLike,
        corrupted: ParagraphsLike,
        metric: MetricName | CustomMetric,
        direction: Direction,
        positions: Positions,
    ) -> PatchingContext:
        """Check the caller's arguments; see `memcircuits.evidence.patching.sweeps.patch_heads`.

        Raises:
            InputError: for a wrong option, or prompts that do not form pairs.
        """
        one_of("direction", direction, DIRECTIONS)
        adapter = adapt(model)
        clean = Paragraphs.of(clean, model, "clean")
        corrupted = Paragraphs.of(corrupted, model, "corrupted", bos=clean.bos)
        if clean.ids.shape != corrupted.ids.shape or clean.n_prefix != corrupted.n_prefix:
            raise InputError(
                "corrupted", repr(corrupted), f"it must pair with clean, {clean!r}, row by row"
            )
        clean.check_same_bos(corrupted, "corrupted")
        for argument, paragraphs in {"clean": clean, "corrupted": corrupted}.items():
            adapter.check_tokens(paragraphs.inputs, argument)
        different = (clean.continuation != corrupted.continuation).any(-1)
        context = cls(
            adapter=adapter,
            clean=clean,
            corrupted=corrupted,
            direction=direction,
            positions=positions if isinstance(positions, str | None) else [*positions],
            metric_names=_metric_names(metric, different),
            custom_metric=metric if callable(metric) else None,
        )
        _ = context.patched  # raises for positions that do not exist
        return context

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def n_prefix(self) -> int:
        """Tokens of the prefix."""
        return self.clean.n_prefix

    @cached_property
    def base(self) -> Paragraphs:
        """What the run patched into reads."""
        return self.clean if self.direction == "noising" else self._corrupted_prefixes

    @cached_property
    def source(self) -> Paragraphs:
        """What the run reads that the activations come from."""
        return self._corrupted_prefixes if self.direction == "noising" else self.clean

    @property
    def _corrupted_prefixes(self) -> Paragraphs:
        ids = torch.cat([self.corrupted.prefix, self.clean.continuation], 1)
        return self.clean.with_ids(ids)

    @cached_property
    def changed(self) -> Bool[Tensor, "batch pos"]:
        """Where the two runs read different tokens; the last token is cut, it predicts nothing.

        Positions are those of `Paragraphs.inputs`, as are those of all activations; the positions
        that the caller chooses, and those of results, count from the paragraph's first token.
        """
        return self.base.inputs[:, :-1] != self.source.inputs[:, :-1]

    @cached_property
    def patched(self) -> Bool[Tensor, "batch pos"]:
        """Where activations are patched; as long as `changed`.

        Raises:
            InputError: for an unknown name, no position, or one that does not exist.
        """
        if self.positions is None:
            return torch.ones_like(self.changed)
        if isinstance(self.positions, str):
            one_of("positions", self.positions, ("changed",))
            return self.changed
        chosen = [int(position) for position in self.positions]
        n_bos = self.clean.n_bos
        n_pos = self.changed.shape[1] - n_bos
        bad = [position for position in chosen if not 0 <= position < n_pos]
        if bad or not chosen:
            raise InputError("positions", bad or "empty", f"give positions in [0, {n_pos})")
        patched = torch.zeros_like(self.changed)
        patched[:, [n_bos + position for position in chosen]] = True
        return patched

    @cached_property
    def first_impacted(self) -> Int[Tensor, " batch"]:
        """Index of the first continuation token that differs; 0 where none does."""
        return (self.clean.continuation != self.corrupted.continuation).long().argmax(-1)

    def with_chosen_metric_only(self) -> PatchingContext:
        """The same pairs, measured by the chosen metric alone."""
        return dataclasses.replace(self, metric_names=self.metric_names[:1])

    def groups(self, size: int) -> list[slice]:
        """Consecutive groups of at most `size` pairs."""
        return [slice(i, min(len(self), i + size)) for i in range(0, len(self), size)]

    def metrics(self, group: slice) -> PairMetrics:
        """The metrics of a group of pairs, as a measure of `ResumableRun`."""
        device = self.adapter.device
        return PairMetrics(
            names=self.metric_names,
            custom=self.custom_metric,
            clean=self.clean.continuation[group].to(device),
            corrupted=self.corrupted.continuation[group].to(device),
            first_impacted=self.first_impacted[group].to(device),
            start=group.start,
        )

    def run_source(
        self, group: slice, sites: Sequence[Site]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "batch metric"]]:
        """Activations of `sites` in all layers of the source run, by name, and its metrics."""
        names = [hook_name(site, layer) for layer in range(self.adapter.n_layers) for site in sites]
        run = run_to_continuation(self.adapter, self.source, group, read=names)
        rows = torch.arange(len(run.logits), device=run.logits.device)
        return run.cache, self.metrics(group)(run.logits, rows).float().cpu()

    def notes(self, samples: Float[Tensor, "batch *value"]) -> tuple[str, ...]:
        """Notes of a result: a fallback taken, pairs that do not differ or were left out."""
        notes = left_out(finite_rows(samples))
        n_same = int((~self.changed.any(-1)).sum())
        if n_same:
            text = f"{n_same} of {len(self)} pairs have equal prefixes"
            notes = (f"{text}: patching changes nothing there", *notes)
        return notes if self.adapter.supports_partial_forward else (FALLBACK, *notes)

    def provenance(self, **options: Any) -> Provenance:
        """Provenance of a result on these pairs."""
        return Provenance.of(
            self.adapter,
            {"clean": self.clean, "corrupted": self.corrupted},
            direction=self.direction,
            positions=self.positions,
            metric=self.metric_names[0],
            **options,
        )


def _metric_names(
    metric: MetricName | CustomMetric, different: Bool[Tensor, " batch"]
) -> tuple[str, ...]:
    """Names of all metrics that are defined, the chosen one first.

    Args:
        metric: the chosen metric.
        different: whether the continuations of each pair differ.
    """
    chosen = getattr(metric, "__name__", "metric") if callable(metric) else metric
    defined = [
        name for name, known in METRICS.items() if different.all() or not known.needs_first_impacted
    ]
    if not callable(metric):
        one_of("metric", metric, METRICS)
        if metric not in defined:
            raise InputError(
                "corrupted",
                f"pair {int((~different).nonzero()[0])} has equal continuations",
                f"no token is impacted: {metric} needs Perturbation.pairs(), or use nll",
            )
    return (chosen, *(name for name in defined if name != chosen))
