"""Edits do what they are for: targets are forgotten or rewritten within the KL budget."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.evaluation import edit_divergence
from memcircuits.editing.find_edit import split_control
from memcircuits.editing.masks import Candidates
from memcircuits.editing.recipe import NATURAL_GRADIENT, STOEHR_2024, Recipe
from memcircuits.editing.unlearning_objective import Targets
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import CONTROL, FORGET, UNSEEN, quick_edit, same_state, state_of


def test_the_targets_are_forgotten_and_unseen_controls_kept(neo_edit):
    model, memorized, result = neo_edit
    assert (mc.scan(model, memorized, progress=False).em == 12).all()
    with result.apply(model):
        em = mc.scan(model, memorized, progress=False).em
    assert result.stopped == "em"
    assert int(em.max()) < 1.2
    assert float(result.history["em"][result.kept]) == pytest.approx(float(em.float().mean()))
    assert float(result.history["kl"][result.kept]) <= 0.05
    assert float(result.history["kl"][0]) == pytest.approx(0, abs=1e-6)
    assert float(edit_divergence(model, result, UNSEEN).mean()) < 0.2


def test_a_change_as_large_in_random_directions_does_far_less(neo_edit):
    model, memorized, result = neo_edit
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(len(d), generator=generator) for name, d in result.deltas.items()}
    scaled = {name: n * result.deltas[name].norm() / n.norm() for name, n in noise.items()}
    random = dataclasses.replace(result, deltas=scaled)
    assert random.norm == pytest.approx(result.norm, rel=1e-4)
    with random.apply(model):
        assert float(mc.scan(model, memorized, progress=False).em.float().mean()) > 6


def test_several_targets_are_forgotten_one_by_one(neo_edit):
    model, memorized, result = neo_edit
    n = round(FORGET["fraction"] * result.n_candidates)
    assert len(result.history["em"]) <= 1 + len(memorized)  # a row for each that had to be edited
    assert n < result.n_masked <= n * (len(result.history["em"]) - 1)  # the union of their masks
    # The KL is that of all turns together, on the controls held out by the same seed.
    _, held = split_control(CONTROL, seed=0)
    kl = float(edit_divergence(model, result, held).mean())
    # So small a KL of float32 log-probabilities is exact to about 1e-7 on any processor.
    assert float(result.history["kl"][-1]) == pytest.approx(kl, rel=1e-4, abs=1e-7)
    alone = mc.unlearn(model, memorized[:1], CONTROL, **FORGET)
    assert alone.n_masked == n
    rate = result.history["em"]
    assert (rate[1:] < rate[:-1]).all()


def test_one_by_one_stops_within_the_budget_of_all(neo_edit):
    model, memorized, result = neo_edit
    kl = result.history["kl"]
    budget = float(0.9 * kl[-2] + 0.1 * kl[-1])
    stopped = mc.unlearn(model, memorized, CONTROL, **FORGET | {"kl_budget": budget})
    assert stopped.stopped == "kl"
    assert float(stopped.history["kl"].max()) <= budget
    before = len(kl) - 1  # the turns before the last are the same
    for name, rows in stopped.history.items():
        torch.testing.assert_close(rows[:before], result.history[name][:before])


def test_nothing_to_forget_changes_nothing(neo_edit):
    model, memorized, _ = neo_edit
    edit = mc.unlearn(model, memorized, CONTROL, **FORGET, em_below=13)
    assert (edit.n_changed, edit.stopped) == (0, "em")
    assert edit.history["em"].tolist() == [12]


def test_without_an_em_that_is_enough_all_targets_share_a_mask(neo_edit):
    model, memorized, _ = neo_edit
    recipe = dataclasses.replace(NATURAL_GRADIENT, steps=2, objective="margin")
    edit = mc.unlearn(model, memorized, CONTROL, **FORGET, em_below=0, recipe=recipe)
    assert edit.n_masked == round(FORGET["fraction"] * edit.n_candidates)


def test_an_interrupt_in_a_later_turn_takes_back_the_earlier_ones(neo_edit, monkeypatch):
    model, memorized, _ = neo_edit
    before = state_of(model)
    choose, changed = Candidates.choose, []

    def interrupted(self, *args, **kwargs):  # each turn begins with a mask
        changed.append(not same_state(before, model.state_dict()))
        if len(changed) == 2:
            raise KeyboardInterrupt
        return choose(self, *args, **kwargs)

    monkeypatch.setattr(Candidates, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mc.unlearn(model, memorized, CONTROL, **FORGET)
    assert changed == [False, True]
    assert same_state(before, model.state_dict())


def test_negative_preference_is_the_formula_of_its_paper(neo_edit):
    """2 / beta log(1 + (p / p_unedited)^beta), whose first gradient is that of the likelihood."""
    model, memorized, result = neo_edit
    adapter = adapt(model)
    targets = Targets.of(adapter, memorized, None, "npo", 0.0, None)
    likelihood = Targets.of(adapter, memorized, None, "nll", 0.0, None)
    mask = Candidates.of(adapter).choose(1.0, None, "all")
    before, gradient = targets.evaluate(mask)
    expected = likelihood.evaluate(mask)[1]
    assert gradient is not None
    assert expected is not None
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    n = memorized.n_continuation
    assert before["forget"].tolist() == pytest.approx([20 * math.log(2) / n] * len(memorized))
    p0 = mc.scan(model, memorized, progress=False).log_prob
    with result.apply(model):
        p = mc.scan(model, memorized, progress=False).log_prob
        after = targets[0].evaluate()[0]["forget"]
    by_hand = 20 / n * math.log1p(math.exp(0.1 * float(p[0] - p0[0])))
    assert after.tolist() == pytest.approx([by_hand], rel=1e-4)


def test_edit_gives_prefixes_another_continuation():
    model = zoo.bridge("gpt_neo")
    memorized = zoo.reciting(model, n=2)
    wanted = mc.Paragraphs(zoo.random_ids(2, 22, seed=9), 10)
    result = mc.edit(
        model,
        memorized,
        wanted,
        CONTROL,
        fraction=0.2,
        kl_budget=0.5,
        progress=False,
        # Longer steps end, on some processors, where no step lowers the loss.
        recipe=dataclasses.replace(NATURAL_GRADIENT, steps=200, step_kl=1e-3),
    )
    assert result.stopped == "em"
    new = mc.Paragraphs(torch.cat([memorized.prefix, wanted.continuation], 1), 10)
    with result.apply(model):
        assert (mc.scan(model, new, progress=False).em == 12).all()
        assert (mc.scan(model, memorized, progress=False).em < 12).all()
    assert float(result.history["em_new"][result.kept]) == 12


def test_the_kl_budget_stops_the_reference_recipe(neo_edit):
    model, memorized, _ = neo_edit
    recipe = dataclasses.replace(STOEHR_2024, steps=50, learning_rate=3e-3, kl_weight=0.01)
    free = quick_edit(model, memorized, recipe=recipe, kl_budget=1e9)
    assert free.stopped == "steps"
    budget = float(free.history["kl"].max()) / 2
    stopped = quick_edit(model, memorized, recipe=recipe, kl_budget=budget)
    assert stopped.stopped == "kl"
    assert float(stopped.history["kl"][-1]) > budget >= float(stopped.history["kl"][stopped.kept])
    assert stopped.kept == len(stopped.history["kl"]) - 2


def test_shorter_steps_are_tried_within_the_budget(neo_edit):
    model, memorized, _ = neo_edit
    recipe = dataclasses.replace(NATURAL_GRADIENT, steps=8)
    one = quick_edit(model, memorized, recipe=dataclasses.replace(recipe, steps=1), em_below=0)
    first = float(one.history["kl"][1])
    result = quick_edit(model, memorized, recipe=recipe, em_below=0, kl_budget=first / 2)
    kl = result.history["kl"]
    assert kl[1] == pytest.approx(first, rel=1e-3)  # refused, and nothing would be left
    assert result.stopped == "kl"
    assert result.kept > 1
    assert first / 8 < kl[result.kept] <= first / 2
    forget = result.history["forget"]
    assert forget[result.kept] < forget[0]


def test_shrinking_keeps_the_targets_forgotten(neo_edit):
    model, memorized, result = neo_edit
    whole = mc.unlearn(
        model,
        memorized,
        CONTROL,
        recipe=dataclasses.replace(NATURAL_GRADIENT, shrink=False),
        **FORGET,
    )
    assert result.norm <= whole.norm
    assert float(result.history["kl"][result.kept]) <= float(whole.history["kl"][whole.kept])
    assert float(result.history["em_max"][result.kept]) < 1.2


def test_the_same_seed_gives_the_same_edit(neo_edit):
    model, memorized, result = neo_edit
    state = torch.get_rng_state()
    again = mc.unlearn(model, memorized, CONTROL, **FORGET)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again.deltas[name], delta) for name, delta in result.deltas.items())
    other = mc.unlearn(model, memorized, CONTROL, **FORGET, seed=1)
    assert set(other.deltas) != set(result.deltas) or other.norm != result.norm


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"mask": "best"}, "mask"),
        ({"control": CONTROL[:1]}, "control"),
        ({"heads": ["L9H0"]}, "heads"),
        ({"heads": ["first"]}, "head"),
        ({"layers": [4]}, "layers"),
        ({"components": ["W_E"]}, "components"),
        ({"heads": ["L0H0"], "components": ["W_in"]}, "heads, layers, components"),
        ({"recipe": Recipe(objective="loss")}, "objective"),
        ({"recipe": Recipe(curvature="some")}, "curvature"),
        ({"recipe": Recipe(steps=0)}, "steps"),
    ],
)
def test_bad_input_is_named_and_nothing_is_changed(neo_edit, options, argument):
    model, memorized, _ = neo_edit
    before = state_of(model)
    with pytest.raises(InputError, match=f"^{argument}:"):
        quick_edit(model, memorized, **options)
    assert same_state(before, model.state_dict())


def test_controls_that_are_memorized_are_refused(neo_edit):
    model, memorized, _ = neo_edit
    with pytest.raises(InputError, match=r"^control: 1 of its paragraphs"):
        quick_edit(model, memorized, control=CONTROL + memorized[1:2])


def test_targets_that_do_not_fit_are_refused(neo_edit):
    model, memorized, _ = neo_edit
    with pytest.raises(InputError, match=r"^targets: one continues as memorized"):
        mc.edit(model, memorized, memorized, CONTROL)
    with pytest.raises(InputError, match=r"^targets: .*give one for each"):
        mc.edit(model, memorized, CONTROL, CONTROL)
