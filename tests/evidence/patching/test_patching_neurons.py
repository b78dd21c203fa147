"""Patched groups of neurons equal whole MLPs and hand-written hooks."""

import pytest
import torch

import memcircuits as mc
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.neurons import patch_neurons
from memcircuits.evidence.patching.sweeps import patch_layers
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain
from tests.helpers.patching import each_case


@pytest.mark.parametrize("direction", DIRECTIONS)
@each_case()
def test_all_neurons_of_a_layer_are_its_mlp(case, direction):
    neurons = patch_neurons(case.model, *case.pair, groups=1, direction=direction, progress=False)
    mlps = patch_layers(case.model, *case.pair, site="mlp_out", direction=direction, progress=False)
    torch.testing.assert_close(neurons.values[:, 0], mlps.whole, atol=2e-5, rtol=1e-4)
    assert neurons.values.abs().max() > 1e-4
    assert neurons.axis == "neuron_group"


def test_groups_equal_plain_hooks():
    """The neurons that differ most first, patched at the changed position only."""
    clean = zoo.mixed(model := zoo.bridge("gpt2"), n=2)[:2]
    ids = clean.ids.clone()
    ids[:, 4] = (ids[:, 4] + 1) % zoo.D_VOCAB
    corrupted = clean.with_ids(ids)
    result = patch_neurons(model, clean, corrupted, groups=3, positions="changed", progress=False)
    plain, layer, kept = Plain("gpt2", zoo.hf_model("gpt2")), 1, []
    w_out = plain.blocks[layer].mlp.c_proj
    handle = w_out.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        plain.logits(clean.ids)
        plain.logits(ids)
        handle.remove()
        size = (kept[0] - kept[1]).abs()[:, 4].sum(0) * w_out.weight.norm(dim=1)
        order = size.argsort(descending=True, stable=True)
        before = plain.nll(clean.ids, 10)
        for index, neurons in enumerate(order.tensor_split(3)):

            def patch(_, args, neurons=neurons):
                post = args[0].clone()
                post[:, 4, neurons] = kept[1][:, 4, neurons]
                return (post,)

            handle = w_out.register_forward_pre_hook(patch)
            change = plain.nll(clean.ids, 10) - before
            handle.remove()
            measured = result.samples["nll"][:, layer, index]
            torch.testing.assert_close(measured, change, atol=1e-5, rtol=0)
    frame = result.to_frame()
    assert list(frame.columns[:3]) == ["layer", "neuron_group", "value"]
    assert ".neurons" in str(result)


def test_equal_prompts_change_nothing(neo):
    clean = zoo.mixed(neo, n=2)[:2]
    assert patch_neurons(neo, clean, clean, progress=False).values.abs().max() == 0


def test_groups_must_be_positive(neo):
    clean = zoo.mixed(neo, n=2)[:2]
    with pytest.raises(mc.InputError, match="groups"):
        patch_neurons(neo, clean, clean, groups=0)
