"""Heads that a localizer should not name: one holds other text, one is damaged for all text.

Before a trial of the kind `decoys` plants its targets, it changes two other heads:

* the *damaged head* gets Gaussian noise on its four matrices, of such a size that the model differs
  by `DAMAGE` nats/token from what it was, on text that it does not recite. Its weights and its
  gradients are large, and all text suffers, but it holds none;
* the *holder of the controls*: the controls that localizers are given are planted through it, so
  that it holds a text, but not the one that is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import Candidates, Mask
from memcircuits.editing.planting import plant
from memcircuits.measure.continuation import continuation_log_probs, kl_divergence
from memcircuits.models.adapter import Adapter

DAMAGE = 0.1
"""KL(undamaged || damaged) on text that is not recited, nats/token."""

_LARGEST = 1024.0  # noise relative to a matrix that would certainly be felt
_BISECTIONS = 8


@contextlib.contextmanager
def decoys(
    adapter: Adapter,
    heads: Sequence[str],
    control: Paragraphs,
    anchors: Paragraphs,
    *,
    steps: int,
    seed: int,
) -> Iterator[None]:
    """Damage one head, and plant the controls through another; undone at the end.

    Args:
        adapter: the model.
        heads: the one that gets noise, and the one that the controls are planted through.
        control: the controls that localizers are given.
        anchors: text that is not to change by planting, and on which the damage is measured.
        steps: of planting.
        seed: of the noise and of planting.

    Raises:
        InputError: if the controls cannot be planted there, or noise on the head changes nothing.
    """
    damaged, holder = heads
    mask = Candidates.of(adapter, heads=[damaged]).choose(1.0, None, "all")
    noise = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed))
    noise = noise.to(mask.device) * mask.root_mean_squares()
    with mask.restored() as original:
        mask.add(original, size_of_damage(adapter, mask, original, noise, anchors) * noise)
        planted = plant(
            adapter.model,
            control,
            where=holder,
            control=anchors,
            steps=steps,
            seed=seed,
            progress=False,
        )
        with planted.apply(adapter.model):
            yield


def size_of_damage(
    adapter: Adapter,
    mask: Mask,
    original: Sequence[Tensor],
    noise: Float[Tensor, " weight"],
    text: Paragraphs,
) -> float:
    """The factor of the noise at which the KL on the text is `DAMAGE`, by bisection.

    Raises:
        InputError: if no factor is large enough.
    """

    def log_probs(size: float) -> Tensor:
        mask.add(original, size * noise)
        with adapter.preserving_state():
            return continuation_log_probs(adapter, text)

    undamaged = log_probs(0.0)

    def damage(size: float) -> float:
        return float(kl_divergence(undamaged, log_probs(size)).mean())

    low, high = 0.0, 0.5
    while damage(high) < DAMAGE:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise InputError("damaged", "noise changes nothing", "choose another head")
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if damage(middle) < DAMAGE else (low, middle)
    return high
