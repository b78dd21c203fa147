"""How much better does a model predict text behind its BOS? Tried on a few sentences.

A tokenizer that puts nothing in front does not prove that the model was trained so: files lose the
setting on the way, when a model is converted for instance. Where a configuration names a BOS, the
NLL of the same tokens with it in front and without therefore tells what the tokenizer does not.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.models.adapter import Adapter

LARGE_GAIN = 0.3
"""A gain that a reader must know of, nats/token."""

SENTENCES = (
    "Our Father which art in heaven, Hallowed be thy name. Thy kingdom come.",
    "We hold these truths to be self-evident, that all men are created equal.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "The train to the coast leaves at nine, and the last one back is at six in the evening.",
)
_MAX_TOKENS = 32


def bos_gain(adapter: Adapter) -> float | None:
    """NLL of the sentences without BOS minus that behind it, nats/token.

    The first token of a sentence is not scored: without BOS nothing predicts it. None where the
    model has no tokenizer or no BOS, or its numbers are not finite.
    """
    bos = _bos_of(adapter)
    if adapter.tokenizer is None or bos is None:
        return None
    n_tokens = min(_MAX_TOKENS, adapter.n_ctx - 1)
    gains = []
    with adapter.preserving_state():
        for sentence in SENTENCES:
            try:
                ids = adapter.tokenizer.encode(sentence, add_special_tokens=False)[:n_tokens]
            except Exception:  # what reads text reports a tokenizer that cannot
                return None
            if len(ids) < 2 or max(ids) >= adapter.d_vocab:
                continue
            bare, behind = torch.tensor([ids]), torch.tensor([[bos, *ids]])
            gains.append(_nll(adapter, bare, 1) - _nll(adapter, behind, 2))
    gain = torch.stack(gains).mean() if gains else torch.tensor(torch.nan)
    return float(gain) if gain.isfinite() else None


def _bos_of(adapter: Adapter) -> int | None:
    """The BOS that the configuration names; without a configuration, the tokenizer's."""
    config: Any = adapter.hf_config
    source = adapter.tokenizer if config is None else config.get_text_config()
    bos = getattr(source, "bos_token_id", None)
    return bos if isinstance(bos, int) and 0 <= bos < adapter.d_vocab else None


def _nll(adapter: Adapter, ids: Int[Tensor, "1 pos"], first: int) -> Tensor:
    """Mean NLL of the tokens from position `first` on, nats/token."""
    log_p = adapter.run(ids[:, :-1]).logits[:, first - 1 :].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, first:, None].to(log_p.device)).mean()
