"""One interface to every TransformerLens model, whatever its class or architecture.

TransformerLens has two generations of models, `HookedTransformer` (3.x) and `TransformerBridge`
(3.x and 4.x), and each wraps dozens of architectures: attention beside the MLP or before it, heads
that share keys and values, fused or transposed weight matrices, attention that is local or that
TransformerLens only observes. Everything else in this package sees an `Adapter`:

* `Adapter.run` is a forward pass with named activations read or replaced, and logits only at the
  positions asked for (`memcircuits.models.hooks`);
* `Adapter.weight` is a weight matrix as `[head, d_in, d_out]`, a *view* of the real parameter, so
  that gradients are read and edits written in the same coordinates for every architecture
  (`memcircuits.models.weights`);
* `Adapter.run_blocks` continues a forward pass in the middle (`memcircuits.models.blocks`), and
  `Adapter.run_after_prefix` behind a prefix (`memcircuits.models.prefix_cache`);
* its class, sizes and basis are those of `memcircuits.models.architecture`;
* `Adapter.fingerprint` names the exact weights (`memcircuits.models.fingerprint`);
* `Adapter.preserving_state` guarantees that the model leaves as it came
  (`memcircuits.models.state`).

A model may be split over several devices. Whatever goes in and comes out here is on one of them,
`Adapter.device`; gradients and weights are where the parameters are.

Interventions happen at the site z, the output of every head before W_O: on several architectures a
Bridge ignores writes to the attention pattern, but none ignores writes to z.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memcircuits.base.errors import InputError, UnsupportedModel
from memcircuits.models import blocks, prefix_cache
from memcircuits.models.architecture import ModelProperties
from memcircuits.models.fingerprint import WeightsFingerprint
from memcircuits.models.foreign_hooks import foreign_hooks
from memcircuits.models.hooks import (
    ActivationEdit,
    Hook,
    editing_hooks,
    hook_name,
    hooked,
    reading_hooks,
    unembedding_only,
)
from memcircuits.models.kernels import fused_forwards
from memcircuits.models.layout import Layout
from memcircuits.models.prefix_cache import KeysValues
from memcircuits.models.state import preserved
from memcircuits.models.weights import HEAD_COMPONENTS, Weight, component_names, find_weight

# What a model raises that cannot be run in an unusual way.
_CANNOT_RUN = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Run:
    """What a forward pass gave: logits at the asked positions and the activations read."""

    logits: Float[Tensor, "batch pos d_vocab"]
    cache: dict[str, Tensor]


class Adapter(ModelProperties):
    """Uniform view of a TransformerLens model. Make one with `adapt(model)`."""

    def __init__(
        self, model: nn.Module, *, name: str | None = None, revision: str | None = None
    ) -> None:
        super().__init__(model, name, revision)
        self._weights_fingerprint = WeightsFingerprint()
        self._calls: dict[int, list[blocks.BlockCall]] = {}
        self._prefix_cache_works: dict[int, bool] = {}
        self._layouts: dict[Hashable, Layout] = {}
        if hook_name("z", 0) not in self.hook_names:
            raise UnsupportedModel(
                "model",
                self.name,
                f"TransformerLens gives it no {hook_name('z', 0)}; use another model",
            )

    def fingerprint(self) -> str:
        """16 digits that name the exact weights; computed anew only after a weight changed.

        See `memcircuits.models.fingerprint` for which changes are noticed.
        """
        return self._weights_fingerprint.of(self.model)

    @property
    def foreign_hooks(self) -> list[str]:
        """Functions of the caller that take part in the forward pass, with their places."""
        return foreign_hooks(self.model)

    def preserving_state(
        self, *, grad: Sequence[nn.Parameter] = ()
    ) -> AbstractContextManager[None]:
        """Evaluate the model and leave it as it came, also after an exception or Ctrl-C.

        Training flags are switched off and restored module by module. `grad` lists the only
        parameters that require gradients inside; without it gradients are off. Gradients are meant
        to be taken by `torch.autograd.grad`, which leaves the caller's `.grad` alone.
        """
        return preserved(self.model, grad, self.fused_forwards)

    @cached_property
    def fused_forwards(self) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        """Modules and the quicker forwards that they have inside `preserving_state`."""
        return fused_forwards(self.model)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        positions: slice = slice(None),
        read: Sequence[str] = (),
        edit: Mapping[str, ActivationEdit] | None = None,
    ) -> Run:
        """One forward pass.

        Args:
            tokens: ids, on any device.
            positions: only these positions are unembedded.
            read: names of the activations to return (`Adapter.hook_names`).
            edit: activation name -> function from the activation to its replacement. The
                activations read are those after the edit.

        Returns:
            Logits [batch, pos, d_vocab] at `positions`, and the activations by name.
        """
        cache: dict[str, Tensor] = {}
        hooks = [*editing_hooks(edit, self.device), *reading_hooks(read, cache, self.device)]
        with self._hooked(hooks), unembedding_only(self.model, positions):
            logits = self.forward(tokens)
        absent = [name for name in read if name not in cache]
        if absent:
            raise UnsupportedModel(
                "model", self.name, f"{absent[0]} never fired; load it with eager attention"
            )
        return Run(logits, cache)

    def forward(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch unembedded d_vocab"]:
        """Plain forward pass of the TransformerLens model: no padding, no BOS, no cache."""
        tokens = tokens.to(self.device)
        if self.is_bridge:
            return self.model(tokens, return_type="logits", use_cache=False).to(self.device)
        # An explicit mask: otherwise HookedTransformer masks tokens that equal the padding id.
        return self.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))

    def _hooked(self, hooks: Sequence[Hook]) -> AbstractContextManager[None]:
        for name, _ in hooks:
            if name not in self.hook_names:
                raise InputError("hook", repr(name), f"{self.kind} {self.name} has no such hook")
        return hooked(self.model, hooks)

    def run_blocks(
        self,
        first: int,
        resid_pre: Float[Tensor, "batch pos d_model"],
        last: int | None = None,
        *,
        edit: Mapping[str, ActivationEdit] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run blocks `first` to `last` (exclusive; default all) on a residual stream.

        `edit` replaces activations as in `run`.
        """
        calls = self._block_calls(resid_pre.shape[1])  # before the hooks: it may run the model
        last = self.n_layers if last is None else last
        with self._hooked(editing_hooks(edit, self.device)):
            resid_post = blocks.run_blocks(self.model, calls, first, last, resid_pre)
        return resid_post.to(self.device)

    def unembed(
        self, resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm, unembedding and (Gemma) soft cap of a residual stream."""
        logits = self.model.unembed(self.model.ln_final(resid))
        cap = getattr(self.hf_config, "final_logit_softcapping", None) or getattr(
            self.model.cfg, "output_logits_soft_cap", None
        )
        logits = torch.tanh(logits / cap) * cap if cap and cap > 0 else logits
        return logits.to(self.device)

    def embeddings(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding of every token, as the model computes it."""
        with self.preserving_state():
            return self.model.embed(torch.arange(self.d_vocab, device=self.device)[None])[0]

    def recording(self) -> AbstractContextManager[blocks.Recording]:
        """Inside, a forward pass records each block's input and the output of its attention."""
        return blocks.recording(self.model, self.device)

    def attention_output(
        self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The output of the attention of `layer`; the rest of the block is not run."""
        calls = self._block_calls(resid_pre.shape[1])
        return blocks.attention_output(self.model, calls, layer, resid_pre).to(self.device)

    def read_z(
        self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The z of every head of `layer`; the rest of the block is not run."""
        name, cache = hook_name("z", layer), dict[str, Tensor]()
        calls = self._block_calls(resid_pre.shape[1])  # before the hook: it may run the model
        with self._hooked(reading_hooks([name], cache, self.device)):
            blocks.attention_output(self.model, calls, layer, resid_pre)
        return cache[name]

    def override_attention_output(
        self, layer: int, attn_out: Float[Tensor, "batch pos d_model"]
    ) -> AbstractContextManager[None]:
        """Inside, the attention of `layer` is not computed but returns `attn_out`.

        The rest of the block (norms, MLP, parallel or not) runs as the model defines it.
        """
        calls = self._block_calls(attn_out.shape[1])
        attn_out = attn_out.to(next(self.model.blocks[layer].parameters()).device)
        return blocks.override_attention_output(self.model, calls, layer, attn_out)

    def _block_calls(self, n_pos: int) -> list[blocks.BlockCall]:
        """How the model calls each of its blocks at this length, recorded once from one row."""
        if n_pos not in self._calls:
            row = torch.zeros(1, n_pos, dtype=torch.long)
            with self.preserving_state():
                self._calls[n_pos] = blocks.record_calls(self.model, lambda: self.forward(row))
        return self._calls[n_pos]

    @cached_property
    def supports_partial_forward(self) -> bool:
        """Whether continuing in the middle gives the full forward's logits, tried on two rows."""
        tokens = torch.arange(16).view(2, 8) % self.d_vocab
        inputs = {layer: hook_name("resid_pre", layer) for layer in (0, self.n_layers - 1)}

        def continued(full: Run) -> list[Tensor]:
            return [
                self.unembed(self.run_blocks(layer, full.cache[name]))
                for layer, name in inputs.items()
            ]

        return self._gives_the_logits(continued, tokens, read=list(inputs.values()))

    def supports_prefix_cache(self, n_pos: int) -> bool:
        """Whether rows of this length can share their beginnings, tried on two rows."""
        if n_pos not in self._prefix_cache_works:
            tokens = torch.arange(2 * n_pos).view(2, n_pos) % self.d_vocab
            start = (n_pos + 1) // 2

            def shared(full: Run) -> list[Tensor]:
                prefix = self.prefix_keys_and_values(tokens[:, :start])
                return [self.run_after_prefix(start, tokens, prefix, torch.arange(2))]

            self._prefix_cache_works[n_pos] = (
                self.is_bridge
                and n_pos > 1
                and self._gives_the_logits(shared, tokens, positions=slice(start, None))
            )
        return self._prefix_cache_works[n_pos]

    def _gives_the_logits(
        self, shortcut: Callable[[Run], list[Tensor]], tokens: Tensor, **options: Any
    ) -> bool:
        """Whether a shortcut from a full run gives its logits, up to rounding."""
        try:
            with self.preserving_state():
                full = self.run(tokens, **options)
                continued = shortcut(full)
        except _CANNOT_RUN:
            return False
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        largest = tolerance * full.logits.abs().max()
        return all(bool((logits - full.logits).abs().max() <= largest) for logits in continued)

    def prefix_keys_and_values(self, tokens: Int[Tensor, "batch pos"]) -> KeysValues:
        """Keys and values of every layer, which rows that begin like these need not compute.

        Only where `supports_prefix_cache(n_pos)` says so.
        """
        return prefix_cache.keys_and_values(self.model, tokens.to(self.device))

    def run_after_prefix(
        self,
        start: int,
        tokens: Int[Tensor, "batch pos"],
        prefix: KeysValues,
        prefix_rows: Int[Tensor, " batch"],
        *,
        positions: slice = slice(None),
    ) -> Float[Tensor, "batch unembedded d_vocab"]:
        """Logits of rows of which positions before `start` are not run.

        Args:
            start: first position run, at least 1.
            tokens: whole rows.
            prefix: keys and values, [row, kv_head, pos, d_head] for every layer.
            prefix_rows: the row of `prefix` that each of `tokens` begins like.
            positions: only these positions, counted from `start`, are unembedded.
        """
        return prefix_cache.run_after_prefix(
            self.model, start, tokens.to(self.device), prefix, prefix_rows, positions
        ).to(self.device)

    def decode(self, tokens: Int[Tensor, "batch pos"], n: int) -> Int[Tensor, "batch continuation"]:
        """The next `n` tokens, each the most likely one, with keys and values kept between steps.

        Only where `supports_prefix_cache(n_pos)` says so.
        """
        return prefix_cache.decode(self.model, tokens.to(self.device), n).to(self.device)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the weight matrices that every block has."""
        return component_names(self.model)

    def weight(self, layer: int, component: str) -> Weight:
        """The weight matrix `component` of block `layer`, split by head where it has heads.

        Raises:
            UnsupportedModel: if the architecture stores it in a form not understood here.
        """
        heads, bypassed = 1, False
        if component in HEAD_COMPONENTS:
            heads = self.n_kv_heads if component in ("W_K", "W_V") else self.n_heads
        elif self.is_bridge:
            # With folded weights TransformerLens computes gated MLPs itself, past their modules.
            bypassed = self.basis == "folded" and "W_gate" in self.components
        options: Any = {"heads": heads, "bypassed": bypassed, "layouts": self._layouts}
        return find_weight(self.model, layer, component, **options)

    def weights(self, components: Sequence[str] | None = None) -> list[Weight]:
        """The weight matrices of every block, or those of some components, layer by layer."""
        return [
            self.weight(layer, component)
            for layer in range(self.n_layers)
            for component in (self.components if components is None else components)
        ]


Model: TypeAlias = nn.Module | Adapter
"""A `HookedTransformer` or a `TransformerBridge`, or the `Adapter` that `adapt` made of one."""
