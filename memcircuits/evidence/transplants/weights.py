"""Transplants of weights: one component of the donor in the receiver, everything else as it was.

The receiver's run is recorded once and continued from the layer of the component
(`memcircuits.evidence.interventions.ResumableRun`):

1. *Heads.* A head's z depends on its own W_Q, W_K and W_V and on the residual stream alone. The
   attention of a layer is therefore run once with the donor's matrices of all heads, which gives
   the z of every transplanted head; what a head adds to the stream is z @ W_O with its own or the
   donor's W_O. All heads of a layer are then continued in one batch. Where heads share keys and
   values, a transplanted head reads the donor's keys and values and its neighbours keep theirs.
2. *MLPs, neurons, layers.* The donor's weights are written into the receiver, and the run continues
   from the input of the block, for MLPs and neurons with the attention's output held.
3. *The rest and all.* A whole forward pass with these weights.

Components of equal weights are not run: their effect is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.evidence.transplants.components import (
    HEAD_MATRICES,
    NeuronOrder,
    patches_of,
)
from memcircuits.models.adapter import Adapter
from memcircuits.models.exchange import exchanged, matrix_patches


class WeightTransplants(NamedTuple):
    """Transplants of weights from a donor into a receiver of the same shape.

    Attributes:
        receiver: the model whose loss is measured.
        donor: the model that the weights come from.
        neurons: the groups of neurons.
    """

    receiver: Adapter
    donor: Adapter
    neurons: NeuronOrder

    def measure(
        self, run: ResumableRun, components: Sequence[Component]
    ) -> Iterator[tuple[list[int], Float[Tensor, "component batch measure"]]]:
        """NLL and EM with each component by itself; yields the columns that were measured."""
        patches = {
            part: patches_of(self.receiver, self.donor, part, self.neurons) for part in components
        }
        changed = [
            (column, part)
            for column, part in enumerate(components)
            if any(patch.changes for patch in patches[part])
        ]
        by_layer: dict[int, list[tuple[int, Component]]] = {}
        for column, part in changed:
            if part.unit in HEAD_MATRICES or part.unit == "attn":
                by_layer.setdefault(part.layer, []).append((column, part))
            else:
                with exchanged(patches[part]):
                    measured = self._rerun(run, part)
                yield [column], measured[None]
        for layer, heads in by_layer.items():
            edits = self._head_edits(run, layer, [part for _, part in heads])
            yield [column for column, _ in heads], run.edited(layer, edits)

    @staticmethod
    def _rerun(run: ResumableRun, part: Component) -> Float[Tensor, "batch measure"]:
        if part.layer < 0:
            return run.rerun()
        return run.rerun(part.layer, keep_attention=part.unit in ("mlp", "neurons"))

    def _head_edits(
        self, run: ResumableRun, layer: int, parts: Sequence[Component]
    ) -> list[HeadEdit]:
        donor_w_o = self.donor.weight(layer, "W_O").values.to(self.receiver.device)
        z_of: dict[str, Tensor] = {}
        edits = []
        for part in parts:
            unit = "head" if part.unit == "attn" else part.unit
            if unit not in z_of:
                z_of[unit] = self._donor_z(run, layer, HEAD_MATRICES[unit])
            heads = [part.head] if part.head >= 0 else list(range(self.receiver.n_heads))
            w_o = None if unit == "qk" else donor_w_o[heads]
            edits.append(HeadEdit(tuple(heads), z_of[unit][:, :, heads], w_o))
        return edits

    def _donor_z(
        self, run: ResumableRun, layer: int, matrices: Sequence[str]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The z of every head with the donor's matrices, from the receiver's residual stream."""
        inner = [name for name in matrices if name != "W_O"]
        with exchanged(matrix_patches(self.receiver, self.donor, layer, inner)):
            rows = [self.receiver.read_z(layer, resid) for resid in run.resid_pre[layer].split(4)]
        return torch.cat(rows)
