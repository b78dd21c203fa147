"""Models of every architecture, class and basis for tests, and copies that a test may change."""

from __future__ import annotations

from typing import Any

import pytest

from memcircuits.models.loading import as_bridge
from tests import matrix
from tests.helpers import models as zoo

EVERY_MODEL = [(name, variant) for name in zoo.ARCHITECTURES for variant in matrix.VARIANTS]

needs_hooked_transformer = pytest.mark.skipif(
    not zoo.has_hooked(), reason="transformer-lens 4 has no HookedTransformer"
)


def model(name: str, variant: str) -> Any:
    """The model of a line of the matrix; leave it as it is."""
    if variant not in matrix.variants():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    return matrix.model(name, variant)


def own_bridge(name: str = "gpt2") -> Any:
    """A bridge of its own, for tests that change it."""
    return as_bridge(zoo.shaken(zoo.hf_model(name)), zoo.tokenizer(), name=f"tiny-{name}")
