"""A mask holds the weights that it should, and reads and writes nothing else."""

from __future__ import annotations

import pytest
import torch

from memcircuits.base.heads import Head
from memcircuits.editing.masks import Candidates
from memcircuits.measure.gradients import mean_gradient
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import CONTROL, n_different, quick_edit, same_state, state_of

ARCHITECTURES = sorted(zoo.ARCHITECTURES)


def test_the_top_mask_holds_the_largest_gradients(neo):
    candidates = Candidates.of(adapt(neo))
    weights = list(candidates.weights)
    _, gradients = mean_gradient(adapt(neo), CONTROL, weights, progress=False)
    mask = candidates.choose(0.01, gradients)
    values = torch.cat([g.abs().flatten() for g in gradients])
    assert len(mask) == round(0.01 * len(values)) == round(0.01 * mask.n_candidates)
    gradient_of = {id(w.parameter): g for w, g in zip(weights, gradients, strict=True)}
    inside = mask.gather([gradient_of[id(parameter)] for parameter in mask.parameters])
    assert inside.abs().min() >= values.sort(descending=True).values[len(mask) - 1]


def test_each_component_has_its_own_largest(neo):
    candidates = Candidates.of(adapt(neo))
    weights = list(candidates.weights)
    _, gradients = mean_gradient(adapt(neo), CONTROL, weights, progress=False)
    mask = candidates.choose(0.01, gradients, "top-per-component")
    positions = {
        (weight.layer, weight.component): index
        for weight, index in zip(mask.weights, mask.indices, strict=True)
    }
    for component in adapt(neo).components:
        split = {
            weight.layer: weight.split(gradient).abs().flatten()
            for weight, gradient in zip(weights, gradients, strict=True)
            if weight.component == component
        }
        every = torch.cat(list(split.values()))
        none = torch.tensor([], dtype=torch.long)
        chosen = [split[layer][positions.get((layer, component), none)] for layer in split]
        expected = every.sort(descending=True).values[: round(0.01 * len(every))]
        torch.testing.assert_close(torch.cat(chosen).sort(descending=True).values, expected)


def test_random_masks_have_the_sizes_they_are_compared_by(neo):
    adapter = adapt(neo)
    candidates = Candidates.of(adapter)
    _, scores = mean_gradient(adapter, CONTROL, list(candidates.weights), progress=False)
    generator = torch.Generator().manual_seed(0)
    top = candidates.choose(0.01, scores)
    anywhere = candidates.choose(0.01, None, "random", generator)
    matched = candidates.choose(0.01, scores, "random-per-tensor", generator)
    whole = candidates.choose(1.0, None, "all")
    assert len(top) == len(anywhere) == len(matched)
    assert sizes(top) == sizes(matched)
    assert len(whole) == len(candidates) == sum(w.values.numel() for w in adapter.weights())
    assert any(not torch.equal(a, b) for a, b in zip(top.indices, matched.indices, strict=True))
    again = candidates.choose(0.01, None, "random", torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(anywhere.indices, again.indices, strict=True))


def sizes(mask):
    return {name: len(index) for name, index in zip(mask.named, mask.indices, strict=True)}


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_a_mask_stays_within_the_heads_layers_and_components_asked_for(name):
    model = zoo.bridge(name)
    adapter = adapt(model)
    memorized = zoo.reciting(model)
    of_head = quick_edit(model, memorized, fraction=0.1, heads=["L1H3"])
    assert set(of_head.indices) <= {"1.W_Q", "1.W_K", "1.W_V", "1.W_O"}
    heads_per_key = adapter.n_heads // adapter.n_kv_heads
    for matrix_name, index in of_head.indices.items():
        component = matrix_name.partition(".")[2]
        head = 3 // heads_per_key if component in ("W_K", "W_V") else 3
        assert (index // adapter.weight(1, component).values[0].numel() == head).all()
    of_layers = quick_edit(model, memorized, layers=[0, 2], components=["W_in"])
    assert set(of_layers.indices) <= {"0.W_in", "2.W_in"}
    assert Candidates.of(adapter, heads=[Head(0, 0)]).weights[0].layer == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("fraction", "strategy"), [(0.05, "random"), (1.0, "all")])
def test_reading_and_writing_a_mask(name, fraction, strategy):
    model = zoo.bridge(name)
    generator = torch.Generator().manual_seed(1)
    mask = Candidates.of(adapt(model)).choose(fraction, None, strategy, generator)
    before = state_of(model)
    values = torch.randn(len(mask), generator=generator).sign()
    with mask.restored() as original:
        mask.add(original, values)
        assert n_different(before, model.state_dict()) == len(mask)
        after = mask.read()
        parts = values.split([len(index) for index in mask.indices])
        for old, new, change in zip(original, after, parts, strict=True):
            torch.testing.assert_close(new, old + change)
        for weight, index, new in zip(mask.weights, mask.indices, after, strict=True):
            assert torch.equal(weight.values.flatten()[index], new)
    assert same_state(before, model.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("fraction", "strategy"), [(0.05, "random"), (1.0, "all")])
def test_values_are_spread_over_matrices_and_selected_again(name, fraction, strategy):
    generator = torch.Generator().manual_seed(2)
    model = zoo.bridge(name)
    mask = Candidates.of(adapt(model)).choose(fraction, None, strategy, generator)
    values = torch.randn(len(mask), generator=generator)
    matrices = mask.spread(values)
    assert torch.equal(mask.select(matrices), values)
    for weight, index, matrix in zip(mask.weights, mask.indices, matrices, strict=True):
        assert matrix.shape == weight.values.shape
        elsewhere = matrix.flatten().clone()
        elsewhere[index] = 0
        assert not elsewhere.any()
    of_parameters = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in mask.weights]
    for weight, tensor, matrix in zip(mask.weights, of_parameters, matrices, strict=True):
        weight.split(tensor).copy_(matrix)
    assert torch.equal(mask.gather(of_parameters), values)
