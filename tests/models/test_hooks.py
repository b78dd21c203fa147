"""Names of activations are TransformerLens's own, for every site and architecture."""

from __future__ import annotations

import pytest

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.models.hooks import HEAD_SITES, SITES, hook_name
from memcircuits.models.registry import adapt


@pytest.mark.parametrize("site", SITES)
def test_every_site_is_an_activation_of_every_block(neo, site):
    adapter = adapt(neo)
    names = {hook_name(site, layer) for layer in range(adapter.n_layers)}
    assert len(names) == adapter.n_layers
    assert names <= adapter.hook_names


def test_every_architecture_has_the_sites_of_heads(any_bridge):
    adapter = adapt(any_bridge)
    assert {hook_name(site, 0) for site in HEAD_SITES} <= adapter.hook_names


@pytest.mark.parametrize("written", ["L3H2", Head(3, 2), (3, 2), [3, 2]])
def test_a_head_of_the_model_however_it_is_written(neo, written):
    assert adapt(neo).check_head(written) == Head(3, 2)


@pytest.mark.parametrize("written", ["L4H0", "L0H4", (4, 0), (-1, 0), (0, -1)])
def test_a_head_that_the_model_does_not_have(neo, written):
    with pytest.raises(InputError, match=r"^heads: L.*; tiny-gpt_neo has 4 layers of 4 heads"):
        adapt(neo).check_head(written)
