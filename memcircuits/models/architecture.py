"""What kind of model a TransformerLens model is: class, sizes, architecture, basis.

TransformerLens has two generations of models, `HookedTransformer` (3.x) and `TransformerBridge`
(3.x and 4.x), which keep the same properties in different places. `ModelProperties` looks them up
once, and checks heads and tokens against them; `memcircuits.models.adapter.Adapter` adds what can
be done with a model.
"""

from __future__ import annotations

import re
import weakref
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head, HeadLike

Basis: TypeAlias = Literal["raw", "folded"]
"""Whether norms or value biases were folded into other weights (`folded`)."""


def is_bridge(model: Any) -> bool:
    """Whether it is a `TransformerBridge`, which wraps a model of transformers."""
    return hasattr(model, "original_model")


def every_module(model: Any) -> list[nn.Module]:
    """Modules of a TransformerLens model and of the transformers model inside a Bridge, each once.

    The root of the transformers model, and whatever no Bridge component wraps (the dropout behind
    the embedding, for one), takes part in a forward pass but is not among `model.modules()`.
    """
    modules = dict.fromkeys(model.modules())
    if is_bridge(model):
        modules |= dict.fromkeys(model.original_model.modules())
    return list(modules)


def every_parameter(model: Any) -> list[nn.Parameter]:
    """Parameters of `every_module`, each once."""
    modules = every_module(model)
    return list(dict.fromkeys(p for module in modules for p in module.parameters(recurse=False)))


def architecture_of(model: Any) -> str:
    """Name of the transformers class, or `unknown`."""
    cfg = model.cfg
    return str(
        getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", "unknown")
    )


class ModelProperties:
    """What a TransformerLens model is.

    Attributes:
        kind: `HookedTransformer` or `TransformerBridge`.
        is_bridge: whether it is a `TransformerBridge`.
        n_layers: number of blocks.
        n_heads: number of query heads per layer.
        n_kv_heads: number of key-value heads per layer.
        d_model: width of the residual stream.
        d_head: width of a head.
        d_vocab: size of the vocabulary.
        n_ctx: longest paragraph, tokens.
        parallel: whether attention and MLP read the same residual stream.
        architecture: name of the transformers class.
        name: what the model is called.
        revision: commit, tag or branch that it came from.
    """

    def __init__(self, model: nn.Module, name: str | None, revision: str | None) -> None:
        # A weak reference: the adapter lives in a dictionary keyed by the model.
        self._model = weakref.ref(model)
        self.kind = type(model).__name__
        self.is_bridge = is_bridge(model)
        cfg: Any = model.cfg
        self.n_layers: int = cfg.n_layers
        self.n_heads: int = cfg.n_heads
        self.n_kv_heads: int = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_head: int = cfg.d_head
        self.d_vocab: int = cfg.d_vocab
        self.n_ctx: int = cfg.n_ctx
        self.parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        self.architecture = architecture_of(model)
        self.name = name or str(getattr(cfg, "model_name", "model"))
        self.revision = revision

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
    def basis(self) -> Basis:
        """`folded` if norms or value biases were folded into other weights, else `raw`.

        Either changes what a head's z of zero, a gradient or an edit means.
        """
        if self.is_bridge:
            # Set by `enable_compatibility_mode()`, unless it was told not to process weights.
            folded = bool(getattr(self.model, "_weights_processed", False))
        else:
            folded = str(self.model.cfg.normalization_type).endswith("Pre")
            # Architectures have biases of queries and of values or neither; only those of values
            # can be folded.
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
        if self.is_bridge:
            config = self.hf_config
            kinds = getattr(config, "attention_layers", None) or getattr(
                config, "layer_types", None
            )
        else:
            kinds = self.model.cfg.attn_types
        local = ("local", "sliding_attention")
        return [layer for layer, kind in enumerate(kinds or []) if kind in local]

    @property
    def hf_config(self) -> Any:
        """The transformers configuration behind a Bridge, else None."""
        return getattr(self.model.original_model, "config", None) if self.is_bridge else None

    @cached_property
    def hook_names(self) -> frozenset[str]:
        """Names of all activations that can be read or written."""
        return frozenset(self.model.hook_dict)

    def heads(self) -> list[Head]:
        """All heads, layer by layer."""
        return [Head(i, j) for i in range(self.n_layers) for j in range(self.n_heads)]

    def check_head(self, head: HeadLike, argument: str = "heads") -> Head:
        """The head of this model that is meant.

        Raises:
            InputError: if it is not written as a head, or the model has no such head.
        """
        owner = f"{self.label} has"
        return Head.of(head).within(self.n_layers, self.n_heads, argument, owner)

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
