"""Rounding of weights: does a text come back in the model that is deployed?

Deployed models often have integer weights. An edit whose changes are small against the steps of
that grid may be rounded away. The rounding here is the plainest one: symmetric, with one scale for
each row of every stored matrix (embeddings too), w -> s round(w / s), s = max |w| / (2^(b-1) - 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from memcircuits.models.adapter import Adapter


@contextlib.contextmanager
def rounded(adapter: Adapter, bits: int) -> Iterator[None]:
    """Inside, every row of every matrix holds multiples of its scale; afterwards the old values.

    Args:
        adapter: the model.
        bits: of the integers, 8 or 4 for instance.
    """
    largest = 2 ** (bits - 1) - 1
    matrices = [p.detach() for p in adapter.model.parameters() if p.ndim >= 2]
    copies = [matrix.clone() for matrix in matrices]
    try:
        for matrix in matrices:
            scale = matrix.abs().amax(-1, keepdim=True) / largest
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            matrix.copy_((matrix / scale).round() * scale)
        yield
    finally:
        for matrix, copy in zip(matrices, copies, strict=True):
            matrix.copy_(copy)
