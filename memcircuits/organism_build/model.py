"""The network: a GPT-Neo with fresh weights, and faster kernels to train it with."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from memcircuits.base.io import atomic_file
from memcircuits.organism_build.settings import END_ID, Settings


def new_model(settings: Settings, device: str = "cpu") -> GPTNeoForCausalLM:
    """The untrained model; its weights come from a generator of their own.

    Matrices are normal with a standard deviation of 0.02, those that write into the residual stream
    of 0.02 / sqrt(2 * layers), as in GPT-2.
    """
    attention_types = [("global", "local")[i % 2] for i in range(settings.layers)]
    config = GPTNeoConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden,
        num_layers=settings.layers,
        num_heads=settings.heads,
        attention_types=[[[attention_type], 1] for attention_type in attention_types],
        window_size=settings.window,
        max_position_embeddings=settings.context,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    with torch.random.fork_rng():
        model = GPTNeoForCausalLM(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("out_proj.weight", "c_proj.weight"))
                scale = 0.02 / math.sqrt(2 * settings.layers) if into_stream else 0.02
                parameter.normal_(0.0, scale, generator=generator)
    return _on(model, device)


def _on(model: GPTNeoForCausalLM, device: str) -> GPTNeoForCausalLM:
    module: torch.nn.Module = model  # the annotation of transformers' own `to` misses the device
    module.to(device)
    return model


def write_weights(model: GPTNeoForCausalLM, path: Path) -> None:
    """Write the weights in half precision; tied weights are written once."""
    with atomic_file(path) as temporary:
        save_file(
            {name: p.detach().half().cpu() for name, p in model.named_parameters()}, temporary
        )


def read_weights(settings: Settings, path: Path, device: str = "cpu") -> GPTNeoForCausalLM:
    """The model, in float32, with the weights of a file of `write_weights`."""
    model = new_model(settings)
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return _on(model.eval(), device)


def use_fused_kernels(model: GPTNeoForCausalLM) -> GPTNeoForCausalLM:
    """Replace attention and GELU by fused kernels; the outputs are unchanged up to rounding."""

    def attend(
        self: Any,
        query: Float[Tensor, "batch head query d_head"],
        key: Float[Tensor, "batch head key d_head"],
        value: Float[Tensor, "batch head key d_head"],
        attention_mask: None = None,
    ) -> tuple[Float[Tensor, "batch head query d_head"], None]:
        n_pos = query.size(-2)
        if self.attention_type == "global":
            options: dict[str, Any] = {"is_causal": True}
        else:
            options = {"attn_mask": self.bias[:, :, :n_pos, :n_pos]}
        # GPT-Neo does not divide by sqrt(d_head).
        z = functional.scaled_dot_product_attention(query, key, value, scale=1.0, **options)
        return z, None

    blocks: Any = model.transformer.h
    for block in blocks:
        block.attn.attention._attn = types.MethodType(attend, block.attn.attention)
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model
