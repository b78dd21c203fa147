"""Run a model in which heads, MLPs or neurons are replaced by their means.

A part with gate g gives out = mean + g (out - mean), with the mean over reference paragraphs at the
same position: its output for no text in particular. Every row of a batch has gates of its
own, so that many subnetworks run in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import finite_rows
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import Continuation, run_to_continuation, score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import ActivationEdit, hook_name

GatedSite: TypeAlias = Literal["z", "mlp_out", "post"]
"""What gates can multiply: heads, whole MLPs, neurons."""

_BATCH_SIZE = 16  # paragraphs


class MeanAblation:
    """The parts of a model that can be replaced by their means.

    Args:
        adapter: the model.
        reference: paragraphs whose activations are averaged.
        sites: which parts; gates are in the order of sites, layers and parts of a layer.

    Attributes:
        adapter: the model.
        n_gates: number of all parts.

    Raises:
        InputError: if all reference paragraphs have non-finite activations.
    """

    def __init__(self, adapter: Adapter, reference: Paragraphs, sites: Sequence[GatedSite]) -> None:
        self.adapter = adapter
        self._names = [hook_name(site, i) for site in sites for i in range(adapter.n_layers)]
        self._means = self._average(reference)
        self._sizes = [self._n_parts(name) for name in self._names]
        self.n_gates = sum(self._sizes)

    def score(
        self, paragraphs: Paragraphs, rows: Int[Tensor, " row"], gates: Float[Tensor, "row gate"]
    ) -> Continuation:
        """Scores of the continuations of some paragraphs, each under gates of its own."""
        return score_continuation(self.adapter, paragraphs, rows, edit=self._edit(gates))

    def _edit(self, gates: Float[Tensor, "row gate"]) -> dict[str, ActivationEdit]:
        parts = gates.to(self.adapter.dtype).split(self._sizes, -1)
        return {
            name: self._gated(self._means[name], gate)
            for name, gate in zip(self._names, parts, strict=True)
        }

    @staticmethod
    def _gated(
        mean: Float[Tensor, "1 pos *part"], gate: Float[Tensor, "row part"]
    ) -> Callable[[Tensor], Tensor]:
        # z has a further axis, d_head; an MLP is one part of d_model numbers.
        shape = (len(gate), 1, -1, *([1] * (mean.ndim - 3)))
        return lambda out: torch.lerp(mean.expand_as(out), out, gate.view(shape))

    def _n_parts(self, name: str) -> int:
        return 1 if name.endswith("mlp_out") else self._means[name].shape[2]

    def _average(self, reference: Paragraphs) -> dict[str, Float[Tensor, "1 pos *part"]]:
        """Mean of every activation over the paragraphs with finite ones."""
        totals: dict[str, Tensor] = {}
        n = 0
        for start in range(0, len(reference), _BATCH_SIZE):
            batch = slice(start, start + _BATCH_SIZE)
            run = run_to_continuation(self.adapter, reference, batch, read=self._names)
            finite = torch.stack([finite_rows(out) for out in run.cache.values()]).all(0)
            for name, out in run.cache.items():
                totals[name] = totals.get(name, 0) + out[finite].double().sum(0)
            n += int(finite.sum())
        if not n:
            raise InputError(
                "control", repr(reference), "all have non-finite activations: use float32"
            )
        return {name: (total / n).to(self.adapter.dtype)[None] for name, total in totals.items()}
