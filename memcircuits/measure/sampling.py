"""The law by which text is sampled: temperature, top-k and top-p, as transformers applies them.

Whoever samples from a model rarely draws from its own distribution. `generate(do_sample=True)` of
transformers changes the logits of every step in this order:

1. divide them by the temperature;
2. top-k: keep the k largest, and all that equal the k-th;
3. top-p (nucleus): keep the most likely tokens until their probabilities reach p, one at least;
4. draw from the softmax of what is kept, which renormalises it.

The probability of a whole continuation is the product of these probabilities, given the true tokens
before. It is 0 as soon as one true token is not kept, whatever the number of samples. The logits of
the forward pass that scores a continuation contain all of this, so that nothing has to be sampled.
The steps are transformers' own functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, fraction, positive

MOST_SAMPLES = 1e12
"""More samples than anybody draws: larger numbers are not told apart."""

_BLOCK = 2**24  # logits that are sorted at once


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn; by default from the model's own distribution.

    `generate(do_sample=True)` of transformers has `top_k=50` unless the model's generation
    configuration says otherwise.

    Attributes:
        temperature: what the logits are divided by.
        top_k: number of tokens that can be drawn; None for all.
        top_p: probability that the most likely tokens together must reach; the others are not
            drawn.

    Example:
        >>> sampled = mc.scan(model, memorized, sampler=mc.Sampler(temperature=0.5, top_k=40))
        >>> bool(sampled.extraction(n=100).min() > 0.99)
        True
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0:
            remedy = "that is greedy decoding, which EM measures already: give more than 0"
            raise InputError("temperature", 0, remedy)
        positive("temperature", self.temperature)
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)
        fraction("top_p", self.top_p)

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature:g}"]
        parts += [] if self.top_k is None else [f"top-k {self.top_k}"]
        parts += [] if self.top_p == 1 else [f"top-p {self.top_p:g}"]
        return ", ".join(parts)

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return (self.temperature, self.top_k, self.top_p) == (1, None, 1)

    def log_prob(
        self, logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """Log p of drawing each target, nats; -inf where it is never drawn."""
        rows, drawn = logits.flatten(0, 1), targets.flatten()
        size = max(1, _BLOCK // logits.shape[-1])
        parts = [
            self._warped(block.float()).log_softmax(-1).gather(-1, block_targets[:, None])[:, 0]
            for block, block_targets in zip(rows.split(size), drawn.split(size), strict=True)
        ]
        return torch.cat(parts).view(targets.shape)

    def _warped(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        """The logits from which transformers draws, -inf for tokens that are not kept."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        no_ids = torch.empty(0, dtype=torch.long)  # these warpers do not look at the text before
        if self.temperature != 1:
            logits = TemperatureLogitsWarper(float(self.temperature))(no_ids, logits)
        if self.top_k is not None:
            logits = TopKLogitsWarper(self.top_k)(no_ids, logits)
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(no_ids, logits)
        return logits
