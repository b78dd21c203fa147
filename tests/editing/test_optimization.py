"""Steppers step as far as they say, and the search goes back where it must."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.editing.curvature import Quadratic
from memcircuits.editing.masks import Mask
from memcircuits.editing.objective import Evaluation, Objective
from memcircuits.editing.optimization import SHORTEST, AdamSteps, TrustRegion, search
from memcircuits.models.registry import adapt


@pytest.fixture
def cost():
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(20, generator=generator) + 0.1
    return Quadratic(diagonal, torch.randn(4, 20, generator=generator))


def gradient(seed=1):
    return torch.randn(20, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Bowl(Objective):
    """Half the squared distance of the change from a goal; over the budget outside of a box."""

    original: torch.Tensor
    goal: torch.Tensor
    box: float

    def evaluate(self, mask, *, last, gradient=True):
        change = torch.cat(mask.read()) - self.original
        loss = float((change - self.goal).square().sum() / 2)
        kl = float(change.abs().max())
        return Evaluation(
            row={"loss": loss, "kl": kl},
            loss=loss,
            gradient=change - self.goal,
            finite=True,
            reached=loss < 1e-3,
            rejected=kl > self.box,
            done=loss < 1e-3,
        )

    def prefers(self, new, best):
        return True


def mask_of_20_weights(model):
    weight = adapt(model).weight(1, "W_in")
    return Mask((weight,), (torch.arange(20),), weight.values.numel())


def minimise(model, stepper, box, steps=60):
    mask = mask_of_20_weights(model)
    with mask.restored() as original:
        bowl = Bowl(torch.cat(original), torch.full((20,), 0.5), box)
        return search(bowl, stepper, mask, original, steps=steps, label="", progress=False)


def test_a_step_of_the_trust_region_has_the_kl_that_it_says(cost):
    stepper = TrustRegion(cost, step_kl=1e-3)
    stepper.propose(gradient(), loss=1.0)
    assert cost.kl(stepper.change) == pytest.approx(1e-3, rel=1e-4)
    assert float(stepper.change @ gradient()) < 0


def test_the_trust_region_halves_its_steps_after_rejections_and_larger_losses(cost):
    stepper = TrustRegion(cost, step_kl=1e-3)
    stepper.propose(gradient(), loss=1.0)
    first = stepper.change
    assert stepper.reject()
    torch.testing.assert_close(stepper.change, first / 2)
    stepper.propose(gradient(), loss=2.0)
    torch.testing.assert_close(stepper.change, first / 2 + first / 4)
    while stepper.reject():
        assert stepper.length >= SHORTEST * stepper.first_length / 2
    assert stepper.length < SHORTEST * stepper.first_length


def test_adam_steps_in_units_of_the_scale_and_cannot_be_shortened():
    scale = torch.tensor([1.0, 2.0])
    stepper = AdamSteps(scale, learning_rate=0.1)
    stepper.propose(torch.tensor([3.0, -4.0]), loss=1.0)
    torch.testing.assert_close(stepper.change, torch.tensor([-0.1, 0.2]))
    assert not stepper.reject()


def test_a_search_stops_when_the_objective_is_reached(neo):
    before = adapt(neo).fingerprint()
    result = minimise(neo, AdamSteps(torch.ones(20), learning_rate=0.05), box=10.0)
    assert result.stopped == "em"
    assert result.kept == len(result.history["loss"]) - 1
    torch.testing.assert_close(result.change, torch.full((20,), 0.5), rtol=0, atol=0.05)
    assert adapt(neo).fingerprint() == before


def test_adam_stops_at_the_budget_and_the_trust_region_goes_up_to_it(neo):
    adam = minimise(neo, AdamSteps(torch.ones(20), learning_rate=0.06), box=0.2)
    assert (adam.stopped, adam.kept) == ("kl", len(adam.history["kl"]) - 2)
    identity = Quadratic(torch.ones(20), torch.zeros(0, 20))
    shorter = minimise(neo, TrustRegion(identity, step_kl=0.15), box=0.2)
    assert shorter.stopped == "kl"
    assert float(shorter.history["kl"][2]) > 0.2  # rejected, and a shorter step was tried
    assert 0.15 < float(shorter.change.abs().max()) <= 0.2


def test_a_search_without_an_acceptable_change_returns_none(neo):
    class Refusing(Bowl):
        def prefers(self, new, best):
            return False

    mask = mask_of_20_weights(neo)
    with mask.restored() as original:
        goal = torch.ones(len(mask))
        objective = Refusing(torch.cat(original), goal, box=10.0)
        stepper = AdamSteps(goal, learning_rate=0.1)
        result = search(objective, stepper, mask, original, steps=2, label="", progress=False)
    assert (result.change, result.kept, result.stopped) == (None, 0, "steps")


def test_a_loss_that_is_not_finite_names_the_option(neo):
    class Diverging(Bowl):
        def evaluate(self, mask, *, last, gradient=True):
            return dataclasses.replace(super().evaluate(mask, last=last), finite=False)

    mask = mask_of_20_weights(neo)
    with mask.restored() as original:
        goal = torch.ones(len(mask))
        objective = Diverging(torch.cat(original), goal, box=10.0)
        stepper = AdamSteps(goal, learning_rate=0.1)
        with pytest.raises(mc.InputError, match=r"^learning_rate: 0.1; .*not finite at step 0"):
            search(objective, stepper, mask, original, steps=2, label="", progress=False)
