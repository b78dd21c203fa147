"""Shared fixtures of the tests of editing."""

from __future__ import annotations

import pytest

import memcircuits as mc
from tests.helpers import models as zoo
from tests.helpers.editing import CONTROL, FORGET


@pytest.fixture(scope="session")
def neo_edit():
    """A model, what it recites, and an edit that makes it forget that; leave the model as it is."""
    model = zoo.bridge("gpt_neo")
    memorized = zoo.reciting(model)
    return model, memorized, mc.unlearn(model, memorized, CONTROL, **FORGET)
