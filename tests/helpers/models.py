"""Tiny random models of every supported architecture, for tests that need no real weights.

Vocabulary 101, context 128, two to four layers, attention with real structure (grouped queries,
local windows, parallel blocks, soft caps). `reciting` makes paragraphs that such a model recites:
its own greedy continuations.
"""

from __future__ import annotations

import functools
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memcircuits import Paragraphs
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt

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
# name -> (prefix of the transformers configuration class, settings)
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
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 8}
_PADDED = {**_GROUPED, "pad_token_id": 0}
_GPT = {**_SMALL, "n_positions": N_CTX, "n_embd": 32, "n_layer": 3, "n_head": 4}
_MIXTURE = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
_LATENT = {  # multi-head latent attention
    **_LLAMA,
    **_MIXTURE,
    "kv_lora_rank": 8,
    "n_routed_experts": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
# More that load, pass the checks at load and are ranked, in less detail than those above.
OTHERS: dict[str, dict[str, Any]] = {
    "Apertus": _GROUPED,
    "Arcee": _GROUPED,
    "Bloom": {**_SMALL, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "CodeGen": {**_GPT, "rotary_dim": 4},
    "Cohere": _PADDED,
    "Cohere2": _PADDED,
    "Ernie4_5": _GROUPED,
    "Exaone4": {**_GROUPED, "sliding_window": 16},
    "Falcon": {**_SMALL, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "GPTBigCode": _GPT,
    "GPTJ": {**_GPT, "rotary_dim": 4},
    "Gemma": {**_WIDE, "pad_token_id": 0},
    "Gemma3Text": {**_WIDE, "pad_token_id": 0, "sliding_window": 16},
    "Glm": {**_WIDE, "pad_token_id": 0},
    "Granite": _GROUPED,
    "HunYuanDenseV1": _WIDE,
    "Mistral": {**_WIDE, "sliding_window": 16},
    "Mpt": {
        "vocab_size": D_VOCAB,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": N_CTX,
    },
    "Nemotron": _WIDE,
    "Olmo": _GROUPED,
    "Olmo2": _GROUPED,
    "Olmo3": _GROUPED,
    "Phi": _GROUPED,
    "Phi3": _PADDED,
    "Qwen2": _GROUPED,
    "SeedOss": _WIDE,
    "SmolLM3": _PADDED,
    "StableLm": _GROUPED,
    "Starcoder2": _GROUPED,
    "XGLM": {
        **_SMALL,
        "max_position_embeddings": N_CTX,
        "d_model": 32,
        "num_layers": 3,
        "attention_heads": 4,
        "ffn_dim": 64,
    },
}
# Those that are refused at load: settings, and a pattern of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BioGpt": (_LLAMA, "TransformerLens cannot wrap it"),
    "DeepseekV2": ({**_LATENT, "q_lora_rank": None}, "no separate W_Q"),
    "DeepseekV3": ({**_LATENT, "q_lora_rank": 8}, "no separate W_Q"),
    "GptOss": (
        {**_WIDE, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16},
        "no separate W_in",
    ),
    "Llama4Text": ({**_WIDE, "num_local_experts": 2}, "no separate W_in"),
    "Mamba": (
        {"vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
        r"no blocks\.0\.attn\.hook_z",
    ),
    "Mixtral": ({**_WIDE, "num_local_experts": 2}, "no separate W_in"),
    "Olmoe": ({**_GROUPED, "num_experts": 2, **_MIXTURE}, "no separate W_in"),
    "OpenAIGPT": (_GPT, "the analyses cannot handle it"),
    "Persimmon": (_LLAMA, "TransformerLens cannot wrap it"),
    "Qwen3Moe": ({**_WIDE, "num_experts": 2, **_MIXTURE}, "no separate W_in"),
}


# Wrapped by transformer-lens 3 these answer otherwise than transformers does.
WRONG = ("HunYuanDenseV1",) if version("transformer-lens").startswith("3.") else ()


def other(name: str) -> Any:
    """A tiny random transformers model of `OTHERS` or `REFUSED`."""
    import transformers

    settings = OTHERS[name] if name in OTHERS else REFUSED[name][0]
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return shaken(model.eval())


def hf_model(name: str, *, seed: int = 0, scale: float = 4.0) -> Any:
    """A tiny random transformers model, the same weights for the same seed.

    Weight matrices are scaled up so that heads and MLPs matter (fresh ones hardly do).
    """
    import transformers

    prefix, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
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


def save(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer into a folder, as `save_pretrained` does."""
    hf_model(name, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bridge(name: str, *, seed: int = 0) -> Any:
    """A tiny `TransformerBridge`."""
    return as_bridge(hf_model(name, seed=seed), tokenizer(), name=f"tiny-{name}")


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [batch, pos]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, D_VOCAB, (rows, length), generator=generator)


def reciting(
    model: Any, *, n: int = 4, n_prefix: int = 10, n_continuation: int = 12, seed: int = 0
) -> Paragraphs:
    """Paragraphs that the model recites: random prefixes with its own greedy continuations."""
    adapter = adapt(model)
    ids = random_ids(n, n_prefix, seed)
    with adapter.preserving_state():
        for _ in range(n_continuation):
            ids = torch.cat([ids, adapter.forward(ids)[:, -1:].argmax(-1).cpu()], 1)
    return Paragraphs.from_tokens(ids, n_prefix=n_prefix)


def mixed(model: Any, *, n: int = 4, n_prefix: int = 10, n_continuation: int = 12) -> Paragraphs:
    """`n` recited and `n` random paragraphs."""
    ids = random_ids(n, n_prefix + n_continuation, seed=1)
    recited = reciting(model, n=n, n_prefix=n_prefix, n_continuation=n_continuation)
    named = Paragraphs(ids, n_prefix, tuple(f"random-{i}" for i in range(n)))
    return Paragraphs(recited.ids, n_prefix, tuple(f"recited-{i}" for i in range(n))) + named


CONVERTERS = {"gpt_neo": "neo", "gemma2": "gemma"}  # where TransformerLens names them otherwise
_GEMMA2 = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "n_key_value_heads": 2,
    "d_mlp": 64,
    "n_layers": 4,
    "n_ctx": N_CTX,
    "d_vocab": D_VOCAB,
    "attn_types": ["local", "global"] * 2,
    "window_size": 16,
    "attn_scale": 256**0.5,  # transformers scales by `query_pre_attn_scalar`, not by d_head
}


def shaken(model: Any, *, seed: int = 5) -> Any:
    """The model with random norm weights and biases; fresh ones are 1 and 0 and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def has_hooked() -> bool:
    """Whether this transformer-lens still has `HookedTransformer` (4.0 removed it)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def hooked(name: str, source: Any = None, *, folded: bool = False) -> Any:
    """A tiny `HookedTransformer` (transformer-lens 3.x) with the weights of `source`.

    Args:
        name: architecture.
        source: a transformers model of it, by default `hf_model(name)`; stays as it is.
        folded: fold norms and centre weights, as `HookedTransformer.from_pretrained` does.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config
    from transformer_lens.pretrained import weight_conversions

    source = hf_model(name) if source is None else source
    if name == "gemma2":  # its configuration is known to TransformerLens by name only
        settings = convert_hf_model_config("google/gemma-2-2b") | _GEMMA2
    else:
        with tempfile.TemporaryDirectory() as folder:
            facts = source.config.to_dict() | {"architectures": [type(source).__name__]}
            # Real GPT-2 files carry n_ctx; a fresh configuration does not.
            Path(folder, "config.json").write_text(json.dumps(facts | {"n_ctx": N_CTX}))
            settings = convert_hf_model_config(folder)
    settings |= {"n_ctx": N_CTX, "init_weights": False, "device": "cpu", "tokenizer_name": None}
    settings["model_name"] = f"tiny-{name}"
    config = HookedTransformerConfig.from_dict(settings)
    model = HookedTransformer(config, tokenizer=tokenizer())
    convert = getattr(weight_conversions, f"convert_{CONVERTERS.get(name, name)}_weights")
    weights = {key: value.detach().clone() for key, value in convert(source, config).items()}
    # Folding and centring assume LayerNorm; TransformerLens does not centre where it is RMSNorm.
    layer_norm = config.normalization_type == "LN"
    model.load_and_process_state_dict(
        weights,
        fold_ln=folded,
        center_writing_weights=folded and layer_norm,
        center_unembed=folded and not config.output_logits_soft_cap > 0,
        fold_value_biases=folded,
    )
    return model.eval()
