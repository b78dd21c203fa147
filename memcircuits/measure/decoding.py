"""Greedy continuations of prefixes, in parallel over positions.

The model's own continuation of a prefix serves as the text that a control "recites". Decoding token
by token takes one forward pass per token. This module needs fewer, by iteration: write a guess for
the whole continuation, run the model once, and replace the guess by the argmax at every position.
A position is right as soon as all positions before it are right, so every pass fixes at least one
more token, and the fixed point is the greedy continuation. Paragraphs that did not change are
finished. The first guess is the given continuation or, where the model can share prefixes
(`Adapter.supports_prefix_cache`), a continuation decoded with cached keys and values. The passes
then confirm it with the same code that scores paragraphs, so that the result has full EM there.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.progress import bar
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt


@plain_torch()
def greedy_continuations(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Paragraphs:
    """The paragraphs with the model's own greedy continuation, of the same length.

    Args:
        model: the model.
        paragraphs: the paragraphs; their continuations may be the first guess (see the module's
            docstring).
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        Paragraphs with the same prefixes, names and metadata.

    Raises:
        InputError: for unusable paragraphs.

    Example:
        >>> own = greedy_continuations(model, control)
        >>> mc.scan(model, own).em.tolist()
        [50, 50, 50, 50]
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    ids, n_prefix = paragraphs.ids.clone(), paragraphs.n_prefix
    given, n_continuation = paragraphs.inputs[:, : paragraphs.n_given], paragraphs.n_continuation
    n_pos = paragraphs.inputs.shape[1]
    size = rows_that_fit(adapter, n_pos, n_continuation, memory_budget)
    unfinished = torch.arange(len(ids))

    def decode(batch: slice) -> Int[Tensor, "batch continuation"]:
        return adapter.decode(given[batch], n_continuation).cpu()

    def predict(batch: slice) -> Int[Tensor, "batch continuation"]:
        rows = unfinished[batch]
        current = paragraphs[rows].with_ids(ids[rows])
        return run_to_continuation(adapter, current).logits.argmax(-1).cpu()

    with adapter.preserving_state(), bar(len(ids), "decode", progress=progress) as progress_bar:
        if adapter.supports_prefix_cache(n_pos - 1):
            ids[:, n_prefix:] = map_batches(len(ids), size, decode)
        for _ in range(n_continuation):
            predicted = map_batches(len(unfinished), size, predict)
            changed = (predicted != ids[unfinished, n_prefix:]).any(-1)
            ids[unfinished, n_prefix:] = predicted
            progress_bar.update(int((~changed).sum()))
            unfinished = unfinished[changed]
            if not len(unfinished):
                break
    return paragraphs.with_ids(ids)
