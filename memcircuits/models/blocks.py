"""Calling the blocks of a model in the middle of a forward pass.

An edit in block l changes nothing below l, so most analyses record what enters each block once and
run only the blocks above an edit. Blocks take more than the residual stream: masks, positions,
rotary tables. What they are given depends on the architecture and on the number of positions but
not on the text, so it is recorded from one forward pass of one row (`record_calls`) and given to
the blocks again for any number of rows (`run_blocks`).

The attention of a block can be run by itself (`attention_output`), or be held at a given output
while the rest of the block runs (`override_attention_output`). Blocks compute exactly what the
model's own code says: parallel attention and MLP, norms after attention, and so on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """Per layer: the residual stream entering the block, and the output of its attention."""

    resid_pre: list[Float[Tensor, "batch pos d_model"]]
    attn_out: list[Float[Tensor, "batch pos d_model"]]


@dataclass(frozen=True)
class BlockCall:
    """How a model calls one of its blocks, recorded from a batch of one row.

    Attributes:
        arguments: positional arguments beside the residual stream.
        keywords: keyword arguments beside the residual stream.
        further_outputs: how many values attention returns beside its output; None if it returns
            the output alone, not a tuple.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    further_outputs: int | None

    def for_batch(self, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a batch of `size` rows."""
        return (
            tuple(_expand(value, size) for value in self.arguments),
            {key: _expand(value, size) for key, value in self.keywords.items()},
        )


def record_calls(model: Any, forward: Callable[[], Any]) -> list[BlockCall]:
    """How the model calls each of its blocks during `forward`, which runs it on one row."""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    further_outputs: dict[int, int | None] = {}

    def on_block(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keywords = {
            key: False if key == "use_cache" else _without_cache(value)
            for key, value in kwargs.items()
            if key != "hidden_states"
        }
        arguments[layer] = tuple(_without_cache(value) for value in args[1:]), keywords

    def on_attention(layer: int, out: Any) -> None:
        further_outputs[layer] = len(out) - 1 if isinstance(out, tuple) else None

    with _watched_blocks(model, on_block, on_attention):
        forward()
    return [BlockCall(*arguments[layer], further_outputs.get(layer)) for layer in sorted(arguments)]


@contextlib.contextmanager
def recording(model: Any, home: torch.device) -> Iterator[Recording]:
    """Inside, a forward pass records what enters every block and what its attention returns.

    The records are on the device `home`, also if the model is split over several.
    """
    record = Recording([], [])

    def on_block(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.resid_pre.append((args[0] if args else kwargs["hidden_states"]).to(home))

    def on_attention(layer: int, out: Any) -> None:
        record.attn_out.append(_first(out).to(home))

    with _watched_blocks(model, on_block, on_attention):
        yield record


@contextlib.contextmanager
def _watched_blocks(
    model: Any,
    on_block: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
    on_attention: Callable[[int, Any], None],
) -> Iterator[None]:
    """Inside, the functions see every block's layer and arguments, and its attention's output."""
    handles = []

    def watch(layer: int, block: Any) -> None:
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: on_block(layer, args, kwargs), with_kwargs=True
            )
        )
        handles.append(
            block.attn.register_forward_hook(lambda _, args, out: on_attention(layer, out))
        )

    try:
        for layer, block in enumerate(model.blocks):
            watch(layer, block)
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_blocks(
    model: Any,
    calls: Sequence[BlockCall],
    first: int,
    last: int,
    resid_pre: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Run blocks `first` to `last` (exclusive) on a residual stream."""
    hidden = resid_pre
    for layer in range(first, last):
        arguments, keywords = calls[layer].for_batch(hidden.shape[0])
        hidden = _first(model.blocks[layer](hidden, *arguments, **keywords))
    return hidden


class _AttentionComputed(Exception):
    """Leaves a block as soon as its attention has been computed."""


def attention_output(
    model: Any,
    calls: Sequence[BlockCall],
    layer: int,
    resid_pre: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """The output of the attention of `layer`; the rest of the block is not run."""
    outputs: list[Tensor] = []

    def on_attention(_: Any, args: Any, out: Any) -> None:
        outputs.append(_first(out))
        raise _AttentionComputed

    handle = model.blocks[layer].attn.register_forward_hook(on_attention)
    try:
        with contextlib.suppress(_AttentionComputed):
            run_blocks(model, calls, layer, layer + 1, resid_pre)
    finally:
        handle.remove()
    return outputs[0]


@contextlib.contextmanager
def override_attention_output(
    model: Any,
    calls: Sequence[BlockCall],
    layer: int,
    attn_out: Float[Tensor, "batch pos d_model"],
) -> Iterator[None]:
    """Inside, the attention of `layer` is not computed but returns `attn_out`.

    The rest of the block (norms, MLP, parallel or not) runs as the model defines it.
    """
    further = calls[layer].further_outputs
    output = attn_out if further is None else (attn_out, *([None] * further))
    # Past `__setattr__`: a Bridge component hands attributes on to the module it wraps.
    attributes = vars(model.blocks[layer].attn)
    replaced = attributes.get("forward")  # by the caller, or by the libraries underneath
    attributes["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        if replaced is None:
            del attributes["forward"]
        else:
            attributes["forward"] = replaced


def _first(out: Any) -> Any:
    """The output of a module that may return further values in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def _expand(value: Any, size: int) -> Any:
    """Repeat a recorded one-row tensor over the batch (a view: masks, positions, rotary tables)."""
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == 1:
        return value.expand(size, *value.shape[1:])
    if isinstance(value, tuple):
        return tuple(_expand(item, size) for item in value)
    return value


def _without_cache(value: Any) -> Any:
    """Key-value caches remember the recorded row: drop them, keep everything else."""
    return None if "Cache" in type(value).__name__ else value
