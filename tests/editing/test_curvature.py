"""The quadratic model is what it says in closed form, and predicts the KL of small changes."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.curvature import Curvature, Quadratic
from memcircuits.editing.find_edit import control_curvature
from memcircuits.editing.masks import Candidates
from memcircuits.editing.recipe import NATURAL_GRADIENT
from memcircuits.editing.unlearning import unlearn
from memcircuits.measure.fisher import damped_root, fisher_diagonal
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

CONTROL = mc.Paragraphs.from_tokens(zoo.random_ids(10, 22, seed=5), n_prefix=10)


def test_the_natural_gradient_solves_the_system():
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(30, generator=generator) + 0.1
    samples = torch.randn(6, 30, generator=generator)
    gradient = torch.randn(30, generator=generator)
    model = Quadratic(diagonal, samples)
    fisher = diagonal.diag() + samples.T @ samples
    natural = model.natural_gradient(gradient)
    torch.testing.assert_close(fisher @ natural, gradient, rtol=1e-4, atol=1e-5)
    assert model.kl(natural) == pytest.approx(float(natural @ fisher @ natural) / 2, rel=1e-4)
    # No other direction gains as much for its KL.
    best = float(gradient @ natural) / model.kl(natural) ** 0.5
    for _ in range(20):
        other = natural + 0.1 * torch.randn(30, generator=generator)
        assert float(gradient @ other) / model.kl(other) ** 0.5 <= best * (1 + 1e-5)
    diagonal_only = Quadratic(diagonal, samples[:0])
    torch.testing.assert_close(diagonal_only.natural_gradient(gradient), gradient / diagonal)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_it_predicts_the_kl_of_a_change_of_many_weights(name):
    model = as_bridge(zoo.hf_model(name).double(), zoo.tokenizer(), name=f"tiny-{name}")
    adapter = adapt(model)
    candidates = Candidates.of(adapter)
    curvature = Curvature.of(adapter, CONTROL, candidates.weights, draws=60, seed=0)
    generator = torch.Generator().manual_seed(0)
    mask = candidates.choose(0.02, None, "random", generator)
    cost = curvature.restrict_to(mask)
    # A change that all of them share: the diagonal alone would miss most of its cost.
    samples = cost.gradient_samples
    signs = torch.randn(len(samples), 1, generator=generator)
    change = samples.mul(signs).sum(0).float()
    change *= (2e-5 / (0.5 * float((samples @ change).square().sum()))) ** 0.5
    sampled = 0.5 * float((samples @ change).square().sum())

    def log_p():
        with adapter.preserving_state():
            logits = adapter.run(CONTROL.ids[:, :-1], positions=slice(9, None)).logits
        return logits.log_softmax(-1)

    original = log_p()
    measured = 0.0
    with mask.restored() as kept:
        for sign in (1, -1):  # the cubic term cancels
            mask.add(kept, sign * change)
            measured += float((original.exp() * (original - log_p())).sum(-1).mean()) / 2
    # The direction was made from the sample, so the sample overstates its cost somewhat.
    assert 0.5 < measured / sampled < 1.2
    diagonal = 0.5 * float((samples.square().sum(0) * change.square()).sum())
    assert diagonal < 0.9 * measured


def test_kept_gradients_and_a_second_pass_agree(neo):
    adapter = adapt(neo)
    weights = adapter.weights()
    mask = Candidates.of(adapter).choose(0.02, None, "random", torch.Generator().manual_seed(1))
    passed, kept = (
        Curvature.of(adapter, CONTROL, weights, draws=3, seed=2, keep=keep)
        for keep in (False, True)
    )
    assert kept.stored_samples
    one, other = (c.restrict_to(mask).gradient_samples for c in (passed, kept))
    assert one.shape == (30, len(mask))
    scale = float(one.abs().max())
    # Batches may come in another order of draws: the products do not depend on it.
    torch.testing.assert_close(one.T @ one, other.T @ other, rtol=0, atol=0.02 * scale**2)
    fisher = fisher_diagonal(adapter, CONTROL, weights, 3, torch.Generator().manual_seed(2))
    for root, expected in zip(passed.roots, damped_root(fisher), strict=True):
        torch.testing.assert_close(root, expected, rtol=1e-3, atol=1e-6)
    assert not len(passed.restrict_to(mask, full=False).gradient_samples)


def test_one_curvature_serves_several_edits():
    model = zoo.bridge("gpt_neo")
    memorized = zoo.reciting(model)
    shared = control_curvature(model, CONTROL, draws=NATURAL_GRADIENT.draws)
    options = {"depth": "surface", "fraction": 0.02, "kl_budget": 0.05, "progress": False}
    for target in memorized[:2]:
        edit = unlearn(model, target, CONTROL, curvature=shared, **options)
        assert edit.stopped == "em"
        with edit.apply(model):
            assert int(mc.scan(model, target, progress=False).em) < 1.2
    with pytest.raises(InputError, match=r"^curvature: of other"):
        unlearn(model, memorized, CONTROL[:6], curvature=shared, **options)
    with pytest.raises(InputError, match=r"^curvature: of other"):
        unlearn(model, memorized, CONTROL, curvature=shared, seed=1, **options)
