"""The one place that knows which TransformerLens class or architecture a model is.

TransformerLens has two generations of models, `HookedTransformer` (3.x) and `TransformerBridge`
(3.x and 4.x), and each wraps dozens of architectures: attention beside the MLP or before it, heads
that share keys and values, fused or transposed weight matrices, attention that is local or that
TransformerLens only observes. Everything else in this package sees an `Adapter`:

* `Adapter.run` is a forward pass with named activations read or replaced, and logits only at the
  positions asked for;
* `Adapter.weight` is a weight matrix as `[head, d_in, d_out]`, a *view* of the real parameter, so
  that gradients are read and edits written in the same coordinates for every architecture;
* `Adapter.run_blocks` continues a forward pass in the middle (see `memcircuits.evidence.interventions`);
* `Adapter.preserving_state` guarantees that the model leaves as it came.

Interventions happen at `hook_z`, the per-head attention output before W_O: on several architectures
a Bridge ignores writes to the attention pattern, but none ignores writes to z.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memcircuits.core.errors import InputError, UnsupportedModel
from memcircuits.core.heads import Head
from memcircuits.models.blocks import AttentionComputed, BlockCall, Recording, without_cache
from memcircuits.models.fingerprint import checksum
from memcircuits.models.hooks import ActivationEdit, editing_hooks, hook_name
from memcircuits.models.kernels import fused_forwards, patched_forwards
from memcircuits.models.prefix_cache import KeysValues
from memcircuits.models.weights import HEAD_COMPONENTS, MLP_COMPONENTS, Weight


@dataclass(frozen=True)
class Run:
    """What a forward pass gave: logits at the asked positions and the activations read."""

    logits: Float[Tensor, "batch pos d_vocab"]
    cache: dict[str, Tensor]


class Adapter:
    """Uniform view of a TransformerLens model. Make one with `adapt(model)`."""

    def __init__(self, model: nn.Module) -> None:
        # A weak reference: the adapter lives in a dictionary keyed by the model.
        self._model = weakref.ref(model)
        self.kind = type(model).__name__
        self.is_bridge = hasattr(model, "original_model")
        cfg: Any = model.cfg
        self.n_layers: int = cfg.n_layers
        self.n_heads: int = cfg.n_heads
        self.n_kv_heads: int = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_head: int = cfg.d_head
        self.d_vocab: int = cfg.d_vocab
        self.n_ctx: int = cfg.n_ctx
        self.parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        self.architecture = str(
            getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", "unknown")
        )
        self.name = str(getattr(cfg, "model_name", "model"))
        self.revision: str | None = None
        self._block_arguments: dict[int, list[BlockCall]] = {}
        self._prefix_cache_works: dict[int, bool] = {}
        missing = [name for name in (hook_name("z", 0),) if name not in self.hook_names]
        if missing:
            raise UnsupportedModel(
                "model", self.name, f"TransformerLens gives it no {missing[0]}; use another model"
            )

    # -- identity -------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The TransformerLens object itself."""
        model = self._model()
        if model is None:
            raise InputError("model", self.name, "the model was deleted; keep a reference to it")
        return model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the first parameter."""
        return next(self.model.parameters()).dtype

    @property
    def basis(self) -> str:
        """`folded` if norms or value biases were folded into other weights, else `raw`.

        Either changes what a head's z of zero, a gradient or an edit means.
        """
        if self.is_bridge:
            # Set by `enable_compatibility_mode()`, unless it was told not to process weights.
            folded = bool(getattr(self.model, "_weights_processed", False))
        else:
            folded = str(self.model.cfg.normalization_type).endswith("Pre")
            # Architectures bias queries and values or neither; only the latter's can be folded.
            biased = [bool(self._biases(name).any()) for name in ("b_Q", "b_V")]
            folded = folded or biased == [True, False]
        return "folded" if folded else "raw"

    def _biases(self, name: str) -> Tensor:
        return torch.stack([getattr(block.attn, name).detach() for block in self.model.blocks])

    @property
    def label(self) -> str:
        """The name without any path of this machine: what reports and saved results show."""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and not Path(self.name).exists():
            return self.name  # OWNER/NAME on the hub
        return PurePath(self.name.replace("\\", "/")).name

    @property
    def local_layers(self) -> list[int]:
        """Layers whose attention sees a sliding window only."""
        if not self.is_bridge:
            kinds = self.model.cfg.attn_types or []
            return [i for i, kind in enumerate(kinds) if kind == "local"]
        config = self.hf_config
        kinds = getattr(config, "attention_layers", None) or getattr(config, "layer_types", None)
        return [i for i, k in enumerate(kinds or []) if k in ("local", "sliding_attention")]

    @property
    def hf_config(self) -> Any:
        """The transformers configuration behind a Bridge, else None."""
        return getattr(self.model.original_model, "config", None) if self.is_bridge else None

    @cached_property
    def hook_names(self) -> frozenset[str]:
        """Names of all activations that can be read or written."""
        return frozenset(self.model.hook_dict)

    def fingerprint(self) -> str:
        """Names the exact weights: exact integer checksums of every tensor's bits, hashed.

        Independent of device and of summation order, and fast enough to take on every call.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{checksum(tensor)}".encode())
        return digest.hexdigest()[:16]

    def heads(self) -> list[Head]:
        """All heads, layer by layer."""
        return [Head(i, j) for i in range(self.n_layers) for j in range(self.n_heads)]

    # -- safety ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def preserving_state(self, *, grad: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        """Evaluate the model and leave it as it came, also after an exception or Ctrl-C.

        Training flags are switched off and restored module by module. `grad` lists the only
        parameters that require gradients inside; without it gradients are off. Gradients are meant
        to be taken by `torch.autograd.grad`, which leaves the caller's `.grad` alone.
        """
        model = self.model
        training = [module for module in model.modules() if module.training]
        wanted = {id(parameter) for parameter in grad}
        flags = [(p, p.requires_grad) for p in model.parameters()] if grad else []
        copies = self._copies() if grad else []
        try:
            for module in training:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in wanted)
            for owner, name, _, parameter in copies:
                owner[name] = parameter
            with torch.set_grad_enabled(bool(grad)), patched_forwards(self._quick):
                yield
        finally:
            for owner, name, tensor, _ in copies:
                owner[name] = tensor
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module in training:
                module.training = True

    @cached_property
    def _quick(self) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        return fused_forwards(self.model)

    def _copies(self) -> list[tuple[dict[str, Any], str, Tensor, nn.Parameter]]:
        """Plain tensors that modules compute with in place of a parameter of the same memory.

        After `enable_compatibility_mode()` the gated MLPs of TransformerLens 3.9 hold such: edits
        of the parameter reach them, gradients do not.
        """
        parameters = {(p.data_ptr(), p.shape): p for p in self.model.parameters() if p.numel()}
        return [
            (vars(module), name, value, parameters[value.data_ptr(), value.shape])
            for module in (self.model.modules() if self.is_bridge else ())
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and (value.data_ptr(), value.shape) in parameters
        ]

    def check_tokens(self, tokens: Tensor, argument: str = "tokens") -> None:
        """Raise `InputError` unless `tokens` are ids that this model can take."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise InputError(argument, tuple(tokens.shape), "give integer ids [batch, pos]")
        if tokens.shape[1] > self.n_ctx:
            raise InputError(
                argument,
                f"{tokens.shape[1]} tokens per paragraph",
                f"the model's context is {self.n_ctx}; use a smaller n_prefix + n_continuation",
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            bad = tokens[(tokens < 0) | (tokens >= self.d_vocab)][0].item()
            raise InputError(
                argument,
                f"token id {bad}",
                f"ids must lie in [0, {self.d_vocab}): were they made by another tokenizer?",
            )

    # -- forward passes -------------------------------------------------------------------------

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

        def keep(name: str) -> Callable[..., None]:
            def hook(tensor: Tensor, hook: Any = None) -> None:
                cache[name] = tensor

            return hook

        hooks = editing_hooks(edit)
        hooks += [(name, keep(name)) for name in read]
        with self._hooked(hooks), self._unembed_only(positions):
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
            return self.model(tokens, return_type="logits", use_cache=False)
        # An explicit mask: otherwise HookedTransformer masks tokens that equal the padding id.
        return self.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))

    @contextlib.contextmanager
    def _hooked(
        self,
        forward: Sequence[tuple[str, Callable[..., Any]]],
        backward: Sequence[tuple[str, Callable[..., Any]]] = (),
    ) -> Iterator[None]:
        for name, _ in (*forward, *backward):
            if name not in self.hook_names:
                raise InputError("hook", repr(name), f"{self.kind} {self.name} has no such hook")
        if not forward and not backward:
            yield
            return
        with self.model.hooks(fwd_hooks=list(forward), bwd_hooks=list(backward)):
            yield

    @contextlib.contextmanager
    def _unembed_only(self, positions: slice) -> Iterator[None]:
        if positions == slice(None):
            yield
            return

        def cut(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (arguments[0][:, positions], *arguments[1:])

        handle = self.model.unembed.register_forward_pre_hook(cut)
        try:
            yield
        finally:
            handle.remove()

    # -- continuing in the middle ---------------------------------------------------------------

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
        hidden = resid_pre
        with self._hooked(editing_hooks(edit)):
            for layer in range(first, self.n_layers if last is None else last):
                arguments, keywords = calls[layer].for_rows(hidden.shape[0])
                out = self.model.blocks[layer](hidden, *arguments, **keywords)
                hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def unembed(
        self, resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm, unembedding and (Gemma) soft cap of a residual stream."""
        logits = self.model.unembed(self.model.ln_final(resid))
        cap = getattr(self.hf_config, "final_logit_softcapping", None) or getattr(
            self.model.cfg, "output_logits_soft_cap", None
        )
        return torch.tanh(logits / cap) * cap if cap and cap > 0 else logits

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record what enters every block and what its attention answers, during a forward pass."""
        record = Recording([], [])

        def on_block(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record.resid_pre.append(args[0] if args else kwargs["hidden_states"])

        def on_attention(_: Any, args: Any, out: Any) -> None:
            record.attn_out.append(out[0] if isinstance(out, tuple) else out)

        handles = []
        try:
            for block in self.model.blocks:
                handles.append(block.register_forward_pre_hook(on_block, with_kwargs=True))
                handles.append(block.attn.register_forward_hook(on_attention))
            yield record
        finally:
            for handle in handles:
                handle.remove()

    def attention_output(
        self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the attention of `layer` answers; the rest of the block is not run."""
        answers: list[Tensor] = []

        def on_attention(_: Any, args: Any, out: Any) -> None:
            answers.append(out[0] if isinstance(out, tuple) else out)
            raise AttentionComputed

        self._block_calls(resid_pre.shape[1])  # before the hook: it may run the model
        handle = self.model.blocks[layer].attn.register_forward_hook(on_attention)
        try:
            with contextlib.suppress(AttentionComputed):
                self.run_blocks(layer, resid_pre, layer + 1)
        finally:
            handle.remove()
        return answers[0]

    @contextlib.contextmanager
    def override_attention_output(
        self, layer: int, attn_out: Float[Tensor, "batch pos d_model"]
    ) -> Iterator[None]:
        """Inside, the attention of `layer` is not computed: it answers `attn_out`.

        The rest of the block (norms, MLP, parallel or not) runs as the model defines it.
        """
        attention = self.model.blocks[layer].attn
        spare = self._block_calls(attn_out.shape[1])[layer].attention_spare
        answer = attn_out if spare is None else (attn_out, *([None] * spare))
        # Past `__setattr__`: a Bridge component hands attributes on to the module it wraps.
        vars(attention)["forward"] = lambda *_, **__: answer
        try:
            yield
        finally:
            del vars(attention)["forward"]

    def _block_calls(self, n_pos: int) -> list[BlockCall]:
        """How the model calls each of its blocks at this length, recorded once from one row."""
        if n_pos in self._block_arguments:
            return self._block_arguments[n_pos]
        calls: dict[int, BlockCall] = {}
        spare: dict[int, int | None] = {}
        handles = []
        for index, block in enumerate(self.model.blocks):

            def on_block(
                _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = index
            ) -> None:
                calls[i] = BlockCall(
                    tuple(without_cache(a) for a in args[1:]),
                    {
                        k: False if k == "use_cache" else without_cache(v)
                        for k, v in kwargs.items()
                        if k != "hidden_states"
                    },
                    None,
                )

            def on_attention(_: Any, args: Any, out: Any, i: int = index) -> None:
                spare[i] = len(out) - 1 if isinstance(out, tuple) else None

            handles.append(block.register_forward_pre_hook(on_block, with_kwargs=True))
            handles.append(block.attn.register_forward_hook(on_attention))
        try:
            with self.preserving_state():
                self.forward(torch.zeros(1, n_pos, dtype=torch.long))
        finally:
            for handle in handles:
                handle.remove()
        self._block_arguments[n_pos] = [
            BlockCall(calls[i].arguments, calls[i].keywords, spare.get(i)) for i in sorted(calls)
        ]
        return self._block_arguments[n_pos]

    # -- sharing the beginning of a text --------------------------------------------------------

    def prefix_keys_and_values(self, tokens: Int[Tensor, "batch pos"]) -> KeysValues:
        """Keys and values of every layer, which rows that begin like these need not compute.

        Only where `supports_prefix_cache(n_pos)` says so.
        """
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        with self._unembed_only(slice(-1, None)):
            self.model.original_model(
                input_ids=tokens.to(self.device), past_key_values=cache, use_cache=True
            )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def run_after_prefix(
        self,
        start: int,
        tokens: Int[Tensor, "batch pos"],
        before: KeysValues,
        rows: Int[Tensor, " batch"],
        *,
        positions: slice = slice(None),
    ) -> Float[Tensor, "batch unembedded d_vocab"]:
        """Logits of rows of which positions before `start` are not run.

        Args:
            start: first position run, at least 1.
            tokens: whole rows.
            before: keys and values, [row, kv_head, pos, d_head] for every layer.
            rows: the row of `before` that each of `tokens` begins like.
            positions: only these positions, counted from `start`, are unembedded.
        """
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        rows = rows.to(self.device)
        for layer, (keys, values) in enumerate(before):
            cache.update(keys[rows, :, :start], values[rows, :, :start], layer)
        with self._unembed_only(positions):
            return self.model.original_model(
                input_ids=tokens[:, start:].to(self.device), past_key_values=cache, use_cache=True
            ).logits

    def decode(self, tokens: Int[Tensor, "batch pos"], n: int) -> Int[Tensor, "batch continuation"]:
        """The next `n` tokens, each the most likely one, with keys and values kept between steps.

        Only where `supports_prefix_cache(n_pos)` says so.
        """
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        new = [tokens.to(self.device)]
        with self._unembed_only(slice(-1, None)):
            for _ in range(n):
                logits = self.model.original_model(
                    input_ids=new[-1], past_key_values=cache, use_cache=True
                ).logits
                new.append(logits.argmax(-1))
        return torch.cat(new[1:], 1)

    def supports_prefix_cache(self, n_pos: int) -> bool:
        """Whether rows of this length can share their beginnings, tried on two rows."""
        if n_pos not in self._prefix_cache_works:
            self._prefix_cache_works[n_pos] = (
                self.is_bridge and n_pos > 1 and self._sharing_works(n_pos)
            )
        return self._prefix_cache_works[n_pos]

    def _sharing_works(self, n_pos: int) -> bool:
        tokens = torch.arange(2 * n_pos).view(2, n_pos) % self.d_vocab
        start = (n_pos + 1) // 2
        try:
            with self.preserving_state():
                whole = self.run(tokens, positions=slice(start, None)).logits
                before = self.prefix_keys_and_values(tokens[:, :start])
                behind = self.run_after_prefix(start, tokens, before, torch.arange(2))
        except (TypeError, RuntimeError, AttributeError, ValueError, KeyError, IndexError):
            return False
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        return bool((behind - whole).abs().max() <= tolerance * whole.abs().max())

    @cached_property
    def supports_partial_forward(self) -> bool:
        """Whether continuing in the middle gives the full forward's logits, tried on two rows."""
        tokens = torch.arange(16).view(2, 8) % self.d_vocab
        names = [hook_name("resid_pre", layer) for layer in {0, self.n_layers - 1}]
        try:
            with self.preserving_state():
                whole = self.run(tokens, read=names)
                parts = [
                    self.unembed(self.run_blocks(int(name.split(".")[1]), whole.cache[name]))
                    for name in names
                ]
        except (TypeError, RuntimeError, AttributeError, ValueError, KeyError, IndexError):
            return False
        scale = whole.logits.abs().max().item()
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        return all((part - whole.logits).abs().max().item() <= tolerance * scale for part in parts)

    # -- weights --------------------------------------------------------------------------------

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the weight matrices that every block has."""
        gate = ("W_gate",) if self._module_of(0, "W_gate") is not None else ()
        return (*HEAD_COMPONENTS, *gate, *MLP_COMPONENTS)

    def weight(self, layer: int, component: str) -> Weight:
        """The weight matrix `component` of block `layer`, split by head where it has heads.

        Raises:
            UnsupportedModel: if the architecture stores it in a form not understood here.
        """
        n = {
            "W_Q": self.n_heads,
            "W_O": self.n_heads,
            "W_K": self.n_kv_heads,
            "W_V": self.n_kv_heads,
        }
        heads = n.get(component, 1)
        if not self.is_bridge:
            parameter = self._hooked_parameter(layer, component)
            return Weight(layer, component, parameter, lambda t: t.view(heads, *t.shape[-2:]))
        module = self._module_of(layer, component)
        held = getattr(module, "weight", None)
        if module is None or not isinstance(held, nn.Parameter):
            raise UnsupportedModel(
                "model", self.architecture, f"its block {layer} has no separate {component}"
            )
        # transformers' Conv1D stores [in, out], torch's Linear [out, in].
        transpose = isinstance(module, nn.Linear)

        def split(tensor: Tensor) -> Tensor:
            matrix = tensor.T if transpose else tensor
            if component == "W_O":
                return matrix.unflatten(0, (heads, -1))
            return matrix.unflatten(1, (heads, -1)).transpose(0, 1)

        # With folded weights TransformerLens computes gated MLPs itself, past their modules.
        bypassed = component not in HEAD_COMPONENTS and (
            self.basis == "folded" and "W_gate" in self.components
        )
        return Weight(layer, component, held, split, None if bypassed else module)

    def weights(self, components: Sequence[str] | None = None) -> list[Weight]:
        """The weight matrices of every block, or those of some components, layer by layer."""
        return [
            self.weight(layer, component)
            for layer in range(self.n_layers)
            for component in (self.components if components is None else components)
        ]

    def _hooked_parameter(self, layer: int, component: str) -> nn.Parameter:
        block = self.model.blocks[layer]
        owner = block.attn if component in HEAD_COMPONENTS else block.mlp
        grouped = owner._parameters.get("_" + component)
        parameter = grouped if grouped is not None else owner._parameters.get(component)
        if parameter is None:
            raise UnsupportedModel("model", self.name, f"block {layer} has no {component}")
        return parameter

    def _module_of(self, layer: int, component: str) -> nn.Module | None:
        block = self.model.blocks[layer]
        if not self.is_bridge:
            has = component in getattr(block.mlp, "_parameters", {})
            return block.mlp if has else None
        owner = block.attn if component in HEAD_COMPONENTS else block.mlp
        child = component.removeprefix("W_").lower() if component != "W_in" else "in"
        bridge = owner._modules.get(child)
        while bridge is not None and getattr(bridge, "original_component", None) is not None:
            bridge = bridge.original_component
        return bridge


Model: TypeAlias = nn.Module | Adapter
"""A `HookedTransformer` or a `TransformerBridge`, or the `Adapter` that `adapt` made of one."""
