"""Shared fixtures; tests never reach for the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny and one worker runs on each core: more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.helpers import models as zoo


@pytest.fixture(scope="session", params=sorted(zoo.ARCHITECTURES))
def any_bridge(request: pytest.FixtureRequest):
    """A tiny bridge of each architecture in turn; leave it as it is."""
    return zoo.bridge(request.param)


@pytest.fixture(scope="session")
def neo():
    """A tiny GPT-Neo bridge; leave it as it is."""
    return zoo.bridge("gpt_neo")
