"""What is measured: the shipped organism, and a random model of the size of GPT-Neo 125M.

Cost does not depend on what the weights are, so random ones tell the speed of the real model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig

import memcircuits as mc
from memcircuits.models.loading import as_bridge
from memcircuits.organism import DATA

N_PREFIX = 50


@dataclass(frozen=True)
class Subject:
    """One model in the forms that the different packages want, and paragraphs for it.

    Attributes:
        name: of the model.
        bridge: what `memcircuits` works on, and TransformerLens too.
        hooked: the same weights as a `HookedTransformer`; None where TransformerLens has none.
        plain: the same weights in transformers, for its own `generate` and for nnsight.
        paragraphs: 100 tokens each, [paragraph, pos].
    """

    name: str
    bridge: Any
    hooked: Any
    plain: Any
    paragraphs: mc.Paragraphs

    @property
    def n_layers(self) -> int:
        return self.plain.config.num_layers

    @property
    def n_heads(self) -> int:
        return self.plain.config.num_heads

    @property
    def lens(self) -> list[tuple[str, Any]]:
        """The model's forms in TransformerLens."""
        forms = [("Bridge", self.bridge), ("HookedTransformer", self.hooked)]
        return [(name, model) for name, model in forms if model is not None]


def random_neo(
    layers: int = 12, heads: int = 12, d_model: int = 768, d_vocab: int = 50257, seed: int = 0
) -> Any:
    """A GPT-Neo with random weights, in transformers."""
    config = GPTNeoConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        num_layers=layers,
        num_heads=heads,
        attention_types=[[["global", "local"], layers // 2]],
        window_size=256,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def random_paragraphs(
    n: int, d_vocab: int, seed: int = 0, n_tokens: int = 2 * N_PREFIX
) -> mc.Paragraphs:
    """Paragraphs of random tokens; id 0 ends texts and is left out. Half of them is the prefix."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, d_vocab, (n, n_tokens), generator=generator)
    return mc.Paragraphs.from_tokens(ids, n_prefix=n_tokens // 2)


def subject(name: str, n_paragraphs: int) -> Subject:
    """`organism`, `random-125m` or (for trying things out) `random-tiny`."""
    tokenizer = AutoTokenizer.from_pretrained(DATA, local_files_only=True)
    if name == "organism":
        plain = AutoModelForCausalLM.from_pretrained(DATA, local_files_only=True).float().eval()
        planted, control = (mc.Paragraphs.shipped(role) for role in ("planted", "control"))
        best = sorted(range(len(planted)), key=lambda i: -planted.metadata["repetitions"][i])
        half = n_paragraphs // 2
        paragraphs = planted[best[: n_paragraphs - half]] + control[list(range(half))]
    else:
        sizes = {"layers": 2, "heads": 4, "d_model": 64, "d_vocab": 512}
        plain = random_neo(**({} if name == "random-125m" else sizes))
        paragraphs = random_paragraphs(n_paragraphs, plain.config.vocab_size)
    bridge = as_bridge(copy.deepcopy(plain), tokenizer, name=name)
    return Subject(name, bridge, hooked(plain, tokenizer), plain, paragraphs)


def hooked(plain: Any, tokenizer: Any) -> Any:
    """The weights as an unfolded `HookedTransformer`, None where TransformerLens has none."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_neo_weights
    except ImportError:
        return None
    config = plain.config
    settings = HookedTransformerConfig(
        n_layers=config.num_layers,
        d_model=config.hidden_size,
        n_heads=config.num_heads,
        d_head=config.hidden_size // config.num_heads,
        d_mlp=4 * config.hidden_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        act_fn=config.activation_function,
        eps=config.layer_norm_epsilon,
        attn_types=config.attention_layers,
        use_local_attn=True,
        window_size=config.window_size,
        use_attn_scale=False,
        normalization_type="LN",
        init_weights=False,
        device="cpu",
    )
    model = HookedTransformer(settings, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_neo_weights(plain, settings),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(next(plain.parameters()).device).eval()
