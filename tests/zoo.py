"""Tiny random models of every supported architecture, for tests that need no real weights.

Vocabulary 101, context 128, two to four layers, attention with real structure (grouped queries,
local windows, parallel blocks, soft caps). `reciting` makes paragraphs that such a model recites:
its own greedy continuations.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memcircuits import Paragraphs
from memcircuits.adapter import adapt
from memcircuits.loading import as_bridge

D_VOCAB, N_CTX = 101, 128
_SMALL = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    **_SMALL,
    "max_position_embeddings": N_CTX,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# name -> (transformers class prefix, configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeo",
        {
            **_SMALL,
            "max_position_embeddings": N_CTX,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 16,
        },
    ),
    "gpt2": ("GPT2", {**_SMALL, "n_positions": N_CTX, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "neox": ("GPTNeoX", _LLAMA),
    "opt": (
        "OPT",
        {
            **_SMALL,
            "max_position_embeddings": N_CTX,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "pad_token_id": 1,
        },
    ),
    "llama": ("Llama", {**_LLAMA, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            **_LLAMA,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 16,
            "pad_token_id": 0,
        },
    ),
}


def hf_model(name: str, *, seed: int = 0, scale: float = 4.0) -> Any:
    """A tiny random transformers model, the same weights for the same seed.

    Weight matrices are scaled up so that heads and MLPs matter (fresh ones hardly do).
    """
    import transformers

    prefix, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "emb" not in key and "wte" not in key and "wpe" not in key:
                parameter.mul_(scale)
    model.set_attn_implementation("eager")
    return model.eval()


@functools.cache
def tokenizer() -> Any:
    """A word-level tokenizer of the tokens `<0>` to `<100>`, loaded from a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {f"<{i}>": i for i in range(D_VOCAB)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<0>")
    folder = Path(tempfile.mkdtemp(prefix="memcircuits-tests-"))
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bridge(name: str, *, seed: int = 0) -> Any:
    """A tiny `TransformerBridge`."""
    return as_bridge(hf_model(name, seed=seed), tokenizer(), name=f"tiny-{name}")


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [row, pos]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, D_VOCAB, (rows, length), generator=generator)


def reciting(
    model: Any, *, n: int = 4, n_prefix: int = 10, n_continuation: int = 12, seed: int = 0
) -> Paragraphs:
    """Paragraphs that the model recites: random prefixes with its own greedy continuations."""
    adapter = adapt(model)
    ids = random_ids(n, n_prefix, seed)
    with adapter.untouched():
        for _ in range(n_continuation):
            ids = torch.cat([ids, adapter.forward(ids)[:, -1:].argmax(-1).cpu()], 1)
    return Paragraphs.from_tokens(ids, n_prefix=n_prefix)


def mixed(model: Any, *, n: int = 4, n_prefix: int = 10, n_continuation: int = 12) -> Paragraphs:
    """`n` recited and `n` random paragraphs."""
    ids = random_ids(n, n_prefix + n_continuation, seed=1)
    recited = reciting(model, n=n, n_prefix=n_prefix, n_continuation=n_continuation)
    named = Paragraphs(ids, n_prefix, tuple(f"random-{i}" for i in range(n)))
    return Paragraphs(recited.ids, n_prefix, tuple(f"recited-{i}" for i in range(n))) + named
