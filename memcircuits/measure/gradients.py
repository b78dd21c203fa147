"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.core.progress import bar
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import (
    continuation_logits,
    read_continuation,
    score_continuation,
)
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import default_budget, iter_batches, rows_that_fit
from memcircuits.models.weights import Weight


def mean_gradient(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: list[Weight],
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[float, list[Tensor]]:
    """Mean NLL over paragraphs, and its gradient for each weight's parameter.

    The caller's `.grad` and `requires_grad` stay as they are.
    """
    parameters = [weight.parameter for weight in weights]
    n = len(paragraphs)
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    loss = 0.0

    def work(piece: slice) -> tuple[float, tuple[Tensor, ...]]:
        part = score_continuation(adapter, paragraphs, piece).nll.sum() / n
        return float(part.detach()), torch.autograd.grad(part, parameters)

    size = rows_with_gradient(adapter, paragraphs, memory_budget)
    with (
        adapter.preserving_state(grad=parameters),
        bar(n, "gradients", progress=progress) as shown,
    ):
        for piece, (part, gradients) in iter_batches(n, size, work):
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
            loss += part
            shown.update(piece.stop - piece.start)
    return loss, totals


def each_gradient(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    reduce: Callable[[int, Float[Tensor, "batch head d_in d_out"]], Tensor],
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[Float[Tensor, " paragraph"], list[Float[Tensor, "paragraph ..."]]]:
    """Each paragraph's NLL (nats/token), and its own gradient for each weight, reduced.

    Where every weight has its own module this takes one forward and backward pass per batch, else
    (HookedTransformer) one per paragraph.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        weights: the matrices.
        reduce: from the index of a weight and the gradients of some paragraphs to what is kept of
            them, [row, ...].
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.
    """
    losses: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in weights]

    def nll(piece: slice, logits: Tensor) -> list[Tensor]:
        return [continuation_nll(paragraphs, piece, logits)]

    with bar(len(paragraphs), "gradients", progress=progress) as shown:
        for values, (found,) in row_gradients(
            adapter, paragraphs, weights, nll, reduce, memory_budget
        ):
            losses.append(values[0])
            for parts, part in zip(kept, found, strict=True):
                parts.append(part)
            shown.update(len(values[0]))
    return torch.cat(losses), [torch.cat(parts) for parts in kept]


def row_gradients(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    scalars: Callable[
        [slice, Float[Tensor, "batch pos d_vocab"]], Sequence[Float[Tensor, " batch"]]
    ],
    reduce: Callable[[int, Float[Tensor, "batch head d_in d_out"]], Tensor],
    memory_budget: int | None = None,
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """For each batch some numbers per paragraph, and of each its reduced gradient per weight.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        weights: the matrices.
        scalars: from a batch's place and its logits at the continuation to the numbers; a
            paragraph's must depend on its own logits only.
        reduce: see `each_gradient`.
        memory_budget: bytes that one batch may take.

    Yields:
        The numbers, [batch] each, and for each of them the reduced gradients of all weights.
    """
    parameters = [weight.parameter for weight in weights]
    together = all(weight.module is not None for weight in weights)
    # Beside the activations, the largest matrix's gradient and a copy of it for every row.
    largest = 2 * max(p.numel() * p.element_size() for p in parameters)
    most = max(1, (memory_budget or default_budget(adapter.device)) // largest)
    size = rows_with_gradient(adapter, paragraphs, memory_budget, most if together else 1)

    def work(piece: slice) -> tuple[list[Tensor], list[list[Tensor]]]:
        if together:
            with _watched(weights) as (inputs, outputs):
                values = scalars(piece, continuation_logits(adapter, paragraphs, piece))
            sources: Sequence[Tensor] = outputs
        else:
            values = scalars(piece, continuation_logits(adapter, paragraphs, piece))
            sources = parameters
        found = []
        for i, value in enumerate(values):
            more = i + 1 < len(values)
            slopes = torch.autograd.grad(value.sum(), sources, retain_graph=more)
            if together:
                rows = piece.stop - piece.start
                gradients = (
                    _per_row(weight, x, slope, rows)
                    for weight, x, slope in zip(weights, inputs, slopes, strict=True)
                )
            else:
                gradients = (w.split(g)[None] for w, g in zip(weights, slopes, strict=True))
            found.append([reduce(j, gradient).detach() for j, gradient in enumerate(gradients)])
        return [value.detach().cpu() for value in values], found

    with adapter.preserving_state(grad=parameters):
        for _, result in iter_batches(len(paragraphs), size, work):
            yield result


def rows_with_gradient(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None, most: int | None = None
) -> int:
    """Rows whose activations, of all layers, fit: a backward pass needs them."""
    n_pos, n_logits = paragraphs.ids.shape[1], paragraphs.n_continuation
    fit = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    return fit if most is None else min(fit, most)


def continuation_nll(
    paragraphs: Paragraphs, piece: slice, logits: Tensor
) -> Float[Tensor, " batch"]:
    return read_continuation(logits, paragraphs.continuation[piece].to(logits.device)).nll


@contextmanager
def _watched(weights: Sequence[Weight]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What each weight's module is given and what it answers, in the weights' order."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []

    def watch(index: int, module: nn.Module) -> None:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            assert index not in seen, "a weight was used twice in one forward pass"
            seen[index] = (arguments[0].detach(), output)

        handles.append(module.register_forward_hook(hook))

    try:
        for i, weight in enumerate(weights):
            assert weight.module is not None
            watch(i, weight.module)
        yield inputs, outputs
        inputs += [seen[i][0] for i in range(len(weights))]
        outputs += [seen[i][1] for i in range(len(weights))]
    finally:
        for handle in handles:
            handle.remove()


def _per_row(
    weight: Weight, x: Tensor, slope: Tensor, rows: int
) -> Float[Tensor, "batch head d_in d_out"]:
    """Each paragraph's gradient: the product of its inputs and output gradients over positions."""
    x, slope = x.reshape(rows, -1, x.shape[-1]), slope.reshape(rows, -1, slope.shape[-1])
    # Linear stores [out, in], Conv1D [in, out].
    first, second = (slope, x) if isinstance(weight.module, nn.Linear) else (x, slope)
    return torch.vmap(weight.split)(torch.bmm(first.transpose(1, 2), second))
