"""TODO."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.progress import bar
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import read_continuation, run_to_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt


def greedy_continuations(
    model: Any,
    paragraphs: Any,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Paragraphs:
    """The paragraphs with the model's own greedy continuation, of the same length.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids; their continuations are
            the first guess (see the module's docstring).
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `Paragraphs` with the same prefixes, names and metadata.

    Raises:
        InputError: for unusable paragraphs.

    Example:
        >>> own = greedy_continuations(model, control)
        >>> mc.scan(model, own).em.tolist()
        [50, 50, 50, 50]
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    ids, n_prefix = paragraphs.ids.clone(), paragraphs.n_prefix
    size = rows_that_fit(adapter, ids.shape[1], paragraphs.n_continuation, memory_budget)
    wrong = torch.arange(len(ids))

    def predict(piece: slice) -> Tensor:
        return run_to_continuation(adapter, ids[wrong[piece]], n_prefix).logits.argmax(-1).cpu()

    with adapter.preserving_state(), bar(len(ids), "decode", progress=progress) as shown:
        if adapter.supports_prefix_cache(ids.shape[1] - 1):
            ids[:, n_prefix:] = map_batches(
                len(ids),
                size,
                lambda piece: adapter.decode(
                    ids[piece, :n_prefix], paragraphs.n_continuation
                ).cpu(),
            )
        for _ in range(paragraphs.n_continuation):
            guess = map_batches(len(wrong), size, predict)
            changed = (guess != ids[wrong, n_prefix:]).any(-1)
            ids[wrong, n_prefix:] = guess
            shown.update(int((~changed).sum()))
            wrong = wrong[changed]
            if not len(wrong):
                break
    return dataclasses.replace(paragraphs, ids=ids)


def em_and_nll(
    adapter: Adapter,
    ids: Int[Tensor, "batch pos"],
    n_prefix: int,
    memory_budget: int | None,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """EM and NLL of paragraphs as they are."""

    def one_batch(piece: slice) -> Tensor:
        run = run_to_continuation(adapter, ids[piece], n_prefix)
        found = read_continuation(run.logits, ids[piece, n_prefix:].to(adapter.device))
        return torch.stack([found.em.float(), found.nll], 1).cpu()

    size = rows_that_fit(adapter, ids.shape[1], ids.shape[1] - n_prefix, memory_budget)
    em, nll = map_batches(len(ids), size, one_batch).unbind(1)
    return em.long(), nll
