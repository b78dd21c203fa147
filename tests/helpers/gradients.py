"""What tests of gradients share: paragraphs of random tokens, and models in float64."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.models.loading import as_bridge
from tests.helpers import models as zoo

PARAGRAPHS = Paragraphs.from_tokens(zoo.random_ids(5, 22), n_prefix=10)
CONTROL = Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=1), n_prefix=10)


@functools.cache
def double_bridge(name: str) -> Any:
    """A tiny bridge in float64, where finite differences are sharp."""
    return as_bridge(zoo.hf_model(name).double(), zoo.tokenizer(), name=f"tiny-{name}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    return float((actual - expected).abs().max() / expected.abs().max())
