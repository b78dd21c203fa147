"""Transplants of activations: the donor's run of the same text, patched into the receiver's run.

Weights tell where a paragraph is stored, activations where it is used: a component whose weights
are the same in both models still passes on what a component below it wrote. Patched at all
positions are

* `head`: z, which the receiver's own W_O reads;
* `attn` and `mlp`: what the layer's attention or MLP adds to the residual stream;
* `layer`: the residual stream after the layer, so that the layers up to it are the donor's and
  those above the receiver's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.components import Component, Unit
from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import Site, hook_name

SITES: dict[Unit, Site] = {"head": "z", "attn": "attn_out", "mlp": "mlp_out", "layer": "resid_post"}
"""The units whose activations can be patched, and the activation of each."""


class ActivationTransplants(NamedTuple):
    """Transplants of activations from a donor into a receiver of the same shape.

    Attributes:
        receiver: the model whose loss is measured.
        donor: the model that the activations come from.
    """

    receiver: Adapter
    donor: Adapter

    def measure(
        self, run: ResumableRun, components: Sequence[Component]
    ) -> Iterator[tuple[list[int], Float[Tensor, "component batch measure"]]]:
        """NLL and EM with each component by itself; yields the columns that were measured."""
        names = {hook_name(SITES[part.unit], part.layer) for part in components}
        with self.donor.preserving_state():
            cache = self.donor.run(run.inputs, positions=slice(-1, None), read=sorted(names)).cache
        everywhere = torch.ones_like(run.inputs, dtype=torch.bool)[None]
        heads_of_layer: dict[int, list[tuple[int, int]]] = {}
        for column, part in enumerate(components):
            name = hook_name(SITES[part.unit], part.layer)
            if part.unit == "head":
                heads_of_layer.setdefault(part.layer, []).append((column, part.head))
            else:
                source = cache[name].to(run.inputs.device)
                yield [column], run.patched(part.layer, name, source, everywhere)
        for layer, columns in heads_of_layer.items():
            z = cache[hook_name("z", layer)].to(run.inputs.device)
            edits = [HeadEdit((head,), z[:, :, [head]]) for _, head in columns]
            yield [column for column, _ in columns], run.edited(layer, edits)
