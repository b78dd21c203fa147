"""What the weight matrices multiply: second moments of their inputs over some texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import continuation_logits
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches, rows_that_fit
from memcircuits.models.hooks import ActivationEdit, Site, hook_name
from memcircuits.models.weights import Weight

_SITES: dict[str, Site] = {"W_O": "z", "W_out": "post"}
"""The activations that a matrix multiplies, where it is no module's."""


def input_moments(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    memory_budget: int | None = None,
) -> list[Float[Tensor, "block d_in d_in"]]:
    """Mean of x x^T over all tokens, x being what a matrix multiplies.

    Args:
        adapter: the model.
        paragraphs: the texts.
        weights: the matrices.
        memory_budget: maximum bytes per batch.

    Returns:
        One for each matrix: of W_O a block for each head, of the others a single block.
    """
    sums = [torch.zeros(()) for _ in weights]
    counts = [0] * len(weights)

    def record(index: int, x: Tensor) -> None:
        heads, d_in, _ = weights[index].values.shape
        n_blocks = heads if weights[index].component == "W_O" else 1
        rows = x.detach().float().reshape(-1, n_blocks, d_in)
        sums[index] = sums[index] + torch.einsum("nhi,nhj->hij", rows, rows).cpu()
        counts[index] += len(rows)

    size = rows_that_fit(
        adapter, paragraphs.inputs.shape[1], paragraphs.n_continuation, memory_budget
    )
    with ExitStack() as hooks, adapter.preserving_state():
        edit = _record_inputs(adapter, weights, record, hooks)
        for _ in iter_batches(
            len(paragraphs),
            size,
            lambda batch: continuation_logits(adapter, paragraphs, batch, edit=edit),
        ):
            pass
    return [total / count for total, count in zip(sums, counts, strict=True)]


def _record_inputs(
    adapter: Adapter,
    weights: Sequence[Weight],
    record: Callable[[int, Tensor], None],
    hooks: ExitStack,
) -> dict[str, ActivationEdit]:
    """Call `record` with the input of each matrix, by hooks and by edits that change nothing."""
    edit: dict[str, ActivationEdit] = {}
    for index, weight in enumerate(weights):
        if weight.module is None and weight.component in _SITES:
            edit[hook_name(_SITES[weight.component], weight.layer)] = _recording(index, record)
            continue
        module: nn.Module | None = weight.module
        if module is None:
            block = adapter.model.blocks[weight.layer]
            module = block.attn if weight.component in ("W_Q", "W_K", "W_V") else block.mlp
        handle = module.register_forward_pre_hook(_on_call(index, record), with_kwargs=True)
        hooks.callback(handle.remove)
    return edit


def _recording(index: int, record: Callable[[int, Tensor], None]) -> ActivationEdit:
    def keep(activation: Tensor) -> Tensor:
        record(index, activation)
        return activation

    return keep


def _on_call(
    index: int, record: Callable[[int, Tensor], None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook for the first tensor that a module is given."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        record(index, next(x for x in (*arguments, *named.values()) if isinstance(x, Tensor)))

    return hook
