"""Keys and values that rows with the same beginning share, as in generation.

Perturbations replace one token at a time, so up to that token a row is the original row. A
transformers model can start from the keys and values of a prefix and run the remaining positions
only; greedy decoding keeps them from step to step. These functions run the transformers model
inside a `TransformerBridge`: hooks do not act there, so nothing can be read or edited.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.models.hooks import unembedding_only

KeysValues: TypeAlias = list[
    tuple[Float[Tensor, "batch kv_head pos d_head"], Float[Tensor, "batch kv_head pos d_head"]]
]
"""Keys and values of every layer."""


def keys_and_values(bridge: Any, tokens: Int[Tensor, "batch pos"]) -> KeysValues:
    """Keys and values of every layer for rows of tokens."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    with unembedding_only(bridge, slice(-1, None)):
        _forward(bridge, tokens, cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def run_after_prefix(
    bridge: Any,
    start: int,
    tokens: Int[Tensor, "batch pos"],
    prefix: KeysValues,
    prefix_rows: Int[Tensor, " batch"],
    positions: slice,
) -> Float[Tensor, "batch unembedded d_vocab"]:
    """Logits of rows of which positions before `start` are not run; see `Adapter`."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        rows = prefix_rows.to(keys.device)  # of a model on several devices, each layer has its own
        cache.update(keys[rows, :, :start], values[rows, :, :start], layer)
    with unembedding_only(bridge, positions):
        return _forward(bridge, tokens[:, start:], cache)


def decode(
    bridge: Any, tokens: Int[Tensor, "batch pos"], n: int
) -> Int[Tensor, "batch continuation"]:
    """The next `n` tokens of every row, each the most likely one."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    steps = [tokens]
    with unembedding_only(bridge, slice(-1, None)):
        for _ in range(n):
            steps.append(_forward(bridge, steps[-1], cache).argmax(-1).to(tokens.device))
    return torch.cat(steps[1:], 1)


def _forward(bridge: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Logits of the transformers model inside; it reads and extends the cache."""
    return bridge.original_model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
