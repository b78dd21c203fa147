"""Greedy decoding and scores by transformers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers import models as zoo


class PlainModel:
    """A tiny transformers model that decodes and scores by itself."""

    def __init__(self, name: str) -> None:
        self.model = zoo.hf_model(name)
        # Tokens 0 and 1 are ordinary here: no token may end the text.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = None

    def decode(self, prefixes: Tensor, n: int) -> Tensor:
        """The `n` tokens that are decoded greedily after each prefix."""
        mask = torch.ones_like(prefixes)
        ids = self.model.generate(prefixes, attention_mask=mask, do_sample=False, max_new_tokens=n)
        assert ids.shape == (len(prefixes), prefixes.shape[1] + n)
        return ids[:, prefixes.shape[1] :]

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(ids).logits

    def nll(self, ids: Tensor, n_prefix: int) -> Tensor:
        """NLL of the continuations, nats/token."""
        log_prob = self.logits(ids[:, :-1])[:, n_prefix - 1 :].log_softmax(-1)
        return -log_prob.gather(-1, ids[:, n_prefix:, None])[..., 0].mean(-1)


def em_of(guess: Tensor, truth: Tensor) -> Tensor:
    """Tokens equal before the first mismatch, counted one by one."""
    counts = []
    for a, b in zip(guess.tolist(), truth.tolist(), strict=True):
        count = 0
        while count < len(a) and a[count] == b[count]:
            count += 1
        counts.append(count)
    return torch.tensor(counts)
