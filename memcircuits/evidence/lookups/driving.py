"""Which heads set a neuron off, and what it does without one of them.

The MLP of layer l reads the residual stream, to which the embedding, the MLPs below and all heads
up to layer l have added (those of layer l too, unless attention and MLP run side by side). With the
scale of the norm in between held at its value, a neuron's input is the sum of what each part added:
head h contributes <z_h W_O^h, w> / scale, where w is the neuron's input weight behind the norm.

That is a first-order answer. The exact one takes z_h W_O^h out of what this MLP reads, and of
nothing else, and runs the norm and the MLP again: the *drop* of the neuron's activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import UnsupportedModel
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.models.norms import mlp_norm

_TOLERANCE = 1e-3  # of what should be constant, relative to the largest number
_TOLERANCE_HALF = 5e-2  # in half precision


@dataclass(frozen=True)
class ResidualParts:
    """What was added to the residual stream that an MLP reads.

    Attributes:
        heads: by every head up to the layer, layer by layer.
        mlps: by the MLPs below.
        embedding: by the embedding of tokens and positions.
        biases: by the biases of attention.
        total: the residual stream itself.
    """

    heads: Float[Tensor, "*row head d_model"]
    mlps: Float[Tensor, "*row layer d_model"]
    embedding: Float[Tensor, "*row d_model"]
    biases: Float[Tensor, "*row d_model"]
    total: Float[Tensor, "*row d_model"]


class NeuronInputs:
    """What the neurons of one layer read.

    Args:
        adapter: the model.
        layer: the layer of the MLP.

    Attributes:
        n_heads: number of heads that the MLP can read.

    Raises:
        UnsupportedModel: if the block has no norm of its own before the MLP.
    """

    def __init__(self, adapter: Adapter, layer: int) -> None:
        self._adapter, self._layer = adapter, layer
        self._norm = mlp_norm(adapter, layer)
        self._layers = range(layer if adapter.parallel else layer + 1)
        self._total = hook_name("resid_pre" if adapter.parallel else "resid_mid", layer)
        component = "W_gate" if "W_gate" in adapter.components else "W_in"
        self._weight = adapter.weight(layer, component).values[0]
        self.n_heads = len(self._layers) * adapter.n_heads

    @property
    def reads(self) -> list[str]:
        """Names of the activations that `parts` needs."""
        z = [hook_name("z", i) for i in self._layers]
        mlps = [hook_name("mlp_out", i) for i in range(self._layer)]
        return [*z, *mlps, hook_name("resid_pre", 0), self._total]

    def parts(
        self, cache: Mapping[str, Tensor], rows: Int[Tensor, " row"], pos: Int[Tensor, " row"]
    ) -> ResidualParts:
        """The residual stream at some positions of a run, taken apart."""
        heads = [
            torch.einsum("rhd,hdm->rhm", cache[hook_name("z", i)][rows, pos], self._w_o(i))
            for i in self._layers
        ]
        mlps = [cache[hook_name("mlp_out", i)][rows, pos] for i in range(self._layer)]
        embedding, total = (
            cache[name][rows, pos] for name in (hook_name("resid_pre", 0), self._total)
        )
        all_heads = torch.cat(heads, 1) if heads else total.new_zeros(len(rows), 0, total.shape[-1])
        all_mlps = torch.stack(mlps, 1) if mlps else total.new_zeros(len(rows), 0, total.shape[-1])
        biases = total - embedding - all_heads.sum(1) - all_mlps.sum(1)
        return ResidualParts(all_heads, all_mlps, embedding, biases, total)

    def _w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        return self._adapter.weight(layer, "W_O").values

    def attribution(
        self,
        part: Float[Tensor, "row *part d_model"],
        total: Float[Tensor, "row d_model"],
        neurons: Int[Tensor, " row"],
    ) -> Float[Tensor, "row *part"]:
        """What a part adds to a neuron's input, with the norm's scale that of `total`."""
        directions = self._norm.pull_back(self._weight.T[neurons]) / self._norm.scale(total)
        return torch.einsum("r...m,rm->r...", part, directions)

    def normed_input(self, total: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row neuron"]:
        """Every neuron's input without its bias."""
        return self._norm(total) @ self._weight

    def activations(
        self, total: Float[Tensor, "row d_model"], neurons: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The activation of one neuron for each residual stream, by the model's own code."""
        adapter, layer = self._adapter, self._layer
        name = hook_name("post", layer)

        def one_batch(batch: slice) -> Float[Tensor, " batch"]:
            read: list[Tensor] = []

            def keep(post: Tensor) -> Tensor:
                read.append(post)
                return post

            # As if nothing stood before: the block's input is the stream, attention adds nothing.
            resid = total[batch].unsqueeze(1)
            with adapter.override_attention_output(layer, torch.zeros_like(resid)):
                adapter.run_blocks(layer, resid, layer + 1, edit={name: keep})
            return read[0].flatten(0, -2).gather(-1, neurons[batch].unsqueeze(-1))[:, 0]

        return map_batches(len(total), rows_that_fit(adapter, 1, 0), one_batch)


def refuse_other_blocks(adapter: Adapter, paragraphs: Paragraphs) -> None:
    """Raise `UnsupportedModel` unless the sums of this module and of `writing` are the model's.

    Tried on the last layer of a run: what heads and MLPs write, what neurons read and what neurons
    write may differ from the sums by constants (biases) only. Where blocks norm what attention or
    the MLP has written, it differs by more.
    """
    layer = adapter.n_layers - 1
    inputs = NeuronInputs(adapter, layer)
    pre, post, out = (
        hook_name("pre", layer),
        hook_name("post", layer),
        hook_name("mlp_out", layer),
    )
    run = run_to_continuation(
        adapter, paragraphs, slice(0, 2), read=[*inputs.reads, pre, post, out]
    )
    n_rows, n_pos = run.cache[out].shape[:2]
    grid = torch.cartesian_prod(torch.arange(n_rows), torch.arange(n_pos)).to(adapter.device)
    parts = inputs.parts(run.cache, *grid.unbind(-1))
    w_out = adapter.weight(layer, "W_out").values[0]
    remainders = (
        (parts.biases, parts.total),
        (run.cache[pre].flatten(0, -2) - inputs.normed_input(parts.total), run.cache[pre]),
        (run.cache[out].flatten(0, -2) - run.cache[post].flatten(0, -2) @ w_out, run.cache[out]),
    )
    tolerance = _TOLERANCE if adapter.dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    for remainder, whole in remainders:
        spread = (remainder - remainder.mean(0)).abs().max()
        if not bool(spread <= tolerance * whole.abs().max()):
            raise UnsupportedModel(
                "model",
                adapter.label,
                "its blocks norm what heads or neurons have written, or read it otherwise than "
                "through one norm: no sum over heads or neurons is exact; use another model",
            )
