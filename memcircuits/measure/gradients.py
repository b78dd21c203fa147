"""Gradients of the continuation's NLL for weight matrices, of the mean and of every paragraph.

There are two routes to a gradient:

* `mean_gradient`: the gradient of the mean over paragraphs, as in equation 2 of the paper
  (arXiv 2403.19851), by one backward pass per batch;
* `paragraph_gradients`: the gradient of every paragraph by itself. A weight matrix maps x to y at
  every position, so the gradient of paragraph p is the product of its own x and dL/dy, summed over
  its positions (Goodfellow 2015, arXiv 1510.01799). Hooks on the weights' modules record x and y,
  and one forward and backward pass of a whole batch gives the gradients of all its paragraphs.
  A `HookedTransformer` has no module per weight; there, batches hold a single paragraph.

`iter_paragraph_gradients` is the second route for any differentiable number per paragraph, such as
the log-probability of drawn labels (`memcircuits.measure.fisher`). The gradients of a batch are as
large as the weights times its paragraphs, so they are reduced by the caller at once and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.base.progress import bar
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import (
    continuation_logits,
    read_continuation,
    score_continuation,
)
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import default_budget, iter_batches, rows_that_fit
from memcircuits.models.weights import Weight

Reduce: TypeAlias = Callable[[int, Float[Tensor, "batch head d_in d_out"]], Tensor]
"""From the index of a weight and the gradients of a batch to what is kept of them."""

Scalars: TypeAlias = Callable[
    [slice, Float[Tensor, "batch pos d_vocab"]], Sequence[Float[Tensor, " batch"]]
]
"""From a batch and its logits at the continuation to some numbers per paragraph."""


def mean_gradient(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: list[Weight],
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[float, list[Tensor]]:
    """Mean NLL over paragraphs (nats/token), and its gradient for each weight's parameter.

    The caller's `.grad` and `requires_grad` stay as they are.
    """
    parameters = [weight.parameter for weight in weights]
    n = len(paragraphs)
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    loss = 0.0

    def one_batch(batch: slice) -> tuple[float, tuple[Tensor, ...]]:
        share = score_continuation(adapter, paragraphs, batch).nll.sum() / n
        return float(share.detach()), torch.autograd.grad(share, parameters)

    size = rows_that_fit_backward(adapter, paragraphs, memory_budget)
    with (
        adapter.preserving_state(grad=parameters),
        bar(n, "gradients", progress=progress) as progress_bar,
    ):
        for batch, (share, grads) in iter_batches(n, size, one_batch):
            for total, grad in zip(totals, grads, strict=True):
                total += grad
            loss += share
            progress_bar.update(batch.stop - batch.start)
    return loss, totals


def paragraph_gradients(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    reduce: Reduce,
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[Float[Tensor, " paragraph"], list[Float[Tensor, "paragraph ..."]]]:
    """Each paragraph's NLL (nats/token), and its own gradient for each weight, reduced.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        weights: the matrices.
        reduce: from the index of a weight and the gradients of a batch to what is kept of them,
            [batch, ...].
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.
    """
    losses: list[Tensor] = []
    reduced: list[list[Tensor]] = [[] for _ in weights]

    def nll(batch: slice, logits: Tensor) -> list[Tensor]:
        targets = paragraphs.continuation[batch].to(logits.device)
        return [read_continuation(logits, targets).nll]

    with bar(len(paragraphs), "gradients", progress=progress) as progress_bar:
        for (batch_losses,), (batch_grads,) in iter_paragraph_gradients(
            adapter, paragraphs, weights, nll, reduce, memory_budget
        ):
            losses.append(batch_losses)
            for of_weight, batch_grad in zip(reduced, batch_grads, strict=True):
                of_weight.append(batch_grad)
            progress_bar.update(len(batch_losses))
    return torch.cat(losses), [torch.cat(of_weight).to(adapter.device) for of_weight in reduced]


def iter_paragraph_gradients(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    scalars: Scalars,
    reduce: Reduce,
    memory_budget: int | None = None,
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Numbers of every paragraph and their reduced gradients for each weight, batch by batch.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        weights: the matrices.
        scalars: from a batch and its logits at the continuation to the numbers; those of a
            paragraph must depend on its own logits only.
        reduce: see `paragraph_gradients`.
        memory_budget: maximum bytes per batch.

    Yields:
        The numbers, [batch] each, and for each of them the reduced gradients of all weights.
    """
    parameters = [weight.parameter for weight in weights]
    batched = all(weight.module is not None for weight in weights)
    size = rows_that_fit_backward(adapter, paragraphs, memory_budget)
    if batched:
        # Beside the activations, the largest matrix's gradient and a copy of it for every row.
        largest = 2 * max(p.numel() * p.element_size() for p in parameters)
        size = min(size, max(1, (memory_budget or default_budget(adapter.device)) // largest))
    else:
        size = 1
    gradients_of_batch = _batched_gradients if batched else _single_gradients

    def one_batch(batch: slice) -> tuple[list[Tensor], list[list[Tensor]]]:
        def values() -> Sequence[Float[Tensor, " batch"]]:
            return scalars(batch, continuation_logits(adapter, paragraphs, batch))

        return gradients_of_batch(weights, values, reduce)

    with adapter.preserving_state(grad=parameters):
        for _, values_and_gradients in iter_batches(len(paragraphs), size, one_batch):
            yield values_and_gradients


def rows_that_fit_backward(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
) -> int:
    """Number of paragraphs whose activations, of all layers, fit: a backward pass needs them."""
    n_pos, n_logits = paragraphs.inputs.shape[1], paragraphs.n_continuation
    return rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)


def _batched_gradients(
    weights: Sequence[Weight],
    forward: Callable[[], Sequence[Float[Tensor, " batch"]]],
    reduce: Reduce,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Gradients of every row of a batch, from the inputs and output gradients of the modules."""
    with _recorded(weights) as (inputs, outputs):
        values = forward()
    reduced = []
    for i, value in enumerate(values):
        is_last = i + 1 == len(values)
        grads = torch.autograd.grad(value.sum(), outputs, retain_graph=not is_last)
        reduced.append(
            [
                reduce(j, _row_gradients(weight, x, grad, len(value))).detach()
                for j, (weight, x, grad) in enumerate(zip(weights, inputs, grads, strict=True))
            ]
        )
    return [value.detach().cpu() for value in values], reduced


def _single_gradients(
    weights: Sequence[Weight],
    forward: Callable[[], Sequence[Float[Tensor, " batch"]]],
    reduce: Reduce,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Gradients of a batch of one row, from the parameters themselves."""
    parameters = [weight.parameter for weight in weights]
    values = forward()
    reduced = []
    for i, value in enumerate(values):
        is_last = i + 1 == len(values)
        grads = torch.autograd.grad(value.sum(), parameters, retain_graph=not is_last)
        reduced.append(
            [
                reduce(j, weight.split(grad)[None]).detach()
                for j, (weight, grad) in enumerate(zip(weights, grads, strict=True))
            ]
        )
    return [value.detach().cpu() for value in values], reduced


@contextmanager
def _recorded(weights: Sequence[Weight]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Record the input and output of each weight's module; the lists are filled on leaving."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    calls: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []

    def record(index: int, module: nn.Module) -> None:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            assert index not in calls, "a weight was used twice in one forward pass"
            calls[index] = (arguments[0].detach(), output)

        handles.append(module.register_forward_hook(hook))

    try:
        for i, weight in enumerate(weights):
            assert weight.module is not None
            record(i, weight.module)
        yield inputs, outputs
        inputs += [calls[i][0] for i in range(len(weights))]
        outputs += [calls[i][1] for i in range(len(weights))]
    finally:
        for handle in handles:
            handle.remove()


def _row_gradients(
    weight: Weight, x: Tensor, grad: Tensor, n_rows: int
) -> Float[Tensor, "batch head d_in d_out"]:
    """Each row's gradient: the product of its inputs and output gradients over positions."""
    x, grad = x.reshape(n_rows, -1, x.shape[-1]), grad.reshape(n_rows, -1, grad.shape[-1])
    first, second = (grad, x) if weight.layout == "out in" else (x, grad)
    return torch.vmap(weight.split)(torch.bmm(first.transpose(1, 2), second))
