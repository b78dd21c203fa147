"""Whitened steps: moments of the inputs, and changes that move every direction alike."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from memcircuits.editing.input_moments import input_moments
from memcircuits.editing.masks import Candidates
from memcircuits.editing.whitening import DAMPING, WhitenedSteps, inverse_roots
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import CONTROL


@cache
def model_of(name: str) -> Any:
    return zoo.bridge(name)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_moments_are_those_of_what_each_matrix_multiplies(name):
    """An output's mean square, of a matrix without bias, follows from the moment of its input."""
    adapter = adapt(model_of(name))
    weights = adapter.weights()
    moments = input_moments(adapter, CONTROL, weights)
    seen: dict[int, list[torch.Tensor]] = {}
    handles = []
    for i, weight in enumerate(weights):
        if weight.module is not None:

            def keep(module, _, output, i=i):
                bias = getattr(module, "bias", None)
                seen.setdefault(i, []).append(output.detach() - (0 if bias is None else bias))

            handles.append(weight.module.register_forward_hook(keep))
    with adapter.preserving_state():
        adapter.run(CONTROL.inputs[:, :-1])
    for handle in handles:
        handle.remove()
    assert seen
    for i, outputs in seen.items():
        weight, moment = weights[i], moments[i]
        if weight.component == "W_O":
            continue  # its heads add up, and their inputs are correlated
        by_moment = torch.einsum("hde,bdf,hfe->he", weight.values, moment, weight.values)
        by_hand = torch.cat([o.reshape(-1, o.shape[-1]) for o in outputs]).square().mean(0)
        torch.testing.assert_close(by_moment.flatten(), by_hand, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_both_classes_of_model_have_the_same_moments(name):
    if not zoo.has_hooked():
        pytest.skip("this transformer-lens has a single class of models")
    models = (model_of(name), zoo.hooked(name))
    first, second = (
        input_moments(adapt(model), CONTROL, adapt(model).weights()) for model in models
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_root_undoes_the_damped_moment():
    adapter = adapt(model_of("gpt_neo"))
    mask = Candidates.of(adapter).choose(1.0, None, "all")
    roots = inverse_roots(adapter, mask, CONTROL)
    moments = input_moments(adapter, CONTROL, mask.weights)
    for root, moment in zip(roots, moments, strict=True):
        size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        damped = moment / size + DAMPING * torch.eye(moment.shape[-1])
        white = root @ damped @ root
        scale = white.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        torch.testing.assert_close(
            white / scale, torch.eye(moment.shape[-1]).expand_as(white), rtol=0, atol=2e-2
        )


def test_steps_follow_the_gradient_in_whitened_coordinates_and_stay_in_the_mask():
    adapter = adapt(model_of("gpt_neo"))
    generator = torch.Generator().manual_seed(0)
    mask = Candidates.of(adapter).choose(0.1, None, "random", generator)
    roots = inverse_roots(adapter, mask, CONTROL)
    start = torch.randn(len(mask), generator=generator)
    steps = WhitenedSteps(mask, roots, 1e-3, None, start)
    assert torch.equal(steps.change, start)
    gradient = torch.randn(len(mask), generator=generator)
    steps.propose(gradient, 0.0)
    moved = steps.change - start
    assert float(moved @ gradient) < 0
    parts = dict(zip(mask.named, zip(roots, mask.indices, strict=True), strict=True))
    name, weight = next(iter(mask.named.items()))
    root, index = parts[name]
    full = torch.zeros(weight.values.numel())
    full[index] = gradient[: len(index)]
    first = -1e-3 * (root @ full.view(weight.values.shape)).sign()  # Adam's first step
    expected = (root @ first).flatten()[index]
    torch.testing.assert_close(moved[: len(index)], expected, rtol=1e-3, atol=1e-6)
