"""Texts, options and comparisons of the tests of editing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import memcircuits as mc
from memcircuits.editing.edit import Edit
from memcircuits.editing.recipe import Recipe
from tests.helpers import models as zoo

CONTROL = mc.Paragraphs.from_tokens(zoo.random_ids(10, 22, seed=5), n_prefix=10)
UNSEEN = mc.Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=6), n_prefix=10)
QUICK = Recipe(steps=3, learning_rate=1e-2)
FORGET: dict[str, Any] = {
    "depth": "surface",
    "fraction": 0.02,
    "kl_budget": 0.05,
    "progress": False,
}
"""Options with which tiny models forget."""


def quick_edit(model: nn.Module, memorized: mc.Paragraphs, **options: Any) -> Edit:
    """A few steps of Adam without any criterion to stop."""
    options = {"recipe": QUICK, "em_below": 0.0, "kl_budget": math.inf, "progress": False} | options
    return mc.unlearn(model, memorized, options.pop("control", CONTROL), **options)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all weights are equal to the bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


def n_different(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """Number of entries that differ."""
    return sum(int((one[name] != other[name]).sum()) for name in one)
