"""Deep unlearning: its attacks, its reference, its gradient, and what it reaches on tiny models."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.attacks import ATTACKS
from memcircuits.editing.deep_objective import DeepObjective
from memcircuits.editing.recipe import DEEP
from memcircuits.editing.references import DRAWS, N_TRUE, proxy_log_probs
from memcircuits.editing.unlearning_objective import ReferenceDistribution
from memcircuits.measure.continuation import continuation_log_probs, kl_divergence
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import CONTROL, same_state, state_of

STRONG = dataclasses.replace(DEEP, steps=12, learning_rate=8e-2, kl_weight=1.0, token_weight=0.0)
DEEPLY = {"recipe": STRONG, "fraction": 1.0, "progress": False}


@pytest.fixture(scope="module")
def neo():
    model = zoo.bridge("gpt_neo")
    return model, zoo.reciting(model, n=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_keeps_the_continuation_and_the_end_of_the_prefix(neo, name):
    _, targets = neo
    attacked = ATTACKS[name](targets, CONTROL, 32, generator())
    assert torch.equal(attacked.continuation, targets.continuation)
    assert not torch.equal(attacked.prefix, targets.prefix)
    if name != "replaced":
        assert torch.equal(attacked.prefix[:, -1], targets.prefix[:, -1])
    again = ATTACKS[name](targets, CONTROL, 32, generator())
    assert torch.equal(attacked.ids, again.ids)
    assert len({ATTACKS[name](targets, CONTROL, 32, generator(i)).hash for i in range(9)}) > 1


def test_text_is_prepended_only_as_far_as_the_context_allows(neo):
    _, targets = neo
    length = targets.ids.shape[1]
    longer = [ATTACKS["prepended"](targets, CONTROL, length + 2, generator(i)) for i in range(9)]
    assert {rows.ids.shape[1] - length for rows in longer} == {1, 2}
    assert ATTACKS["prepended"](targets, CONTROL, length, generator()) is targets


def test_the_proxy_is_half_short_context_and_half_the_text_without_its_memory(neo):
    """Against one forward pass of plain transformers for each position and filler."""
    bridge = zoo.bridge("gpt_neo").double()
    targets, plain = zoo.reciting(bridge, n=2), zoo.hf_model("gpt_neo").double()
    proxy = proxy_log_probs(adapt(bridge), targets, CONTROL, generator())
    chooser = generator()
    for k in range(targets.n_continuation):
        position = targets.n_prefix + k
        fillers = CONTROL.ids[torch.randperm(len(CONTROL), generator=chooser)[:DRAWS]]
        for i in range(len(targets)):
            rows = fillers[:, :position].clone()
            rows[:, -N_TRUE:] = targets.ids[i, position - N_TRUE : position]
            token = int(targets.ids[i, position])
            with torch.no_grad():
                short = plain(rows).logits[:, -1].softmax(-1).mean(0)
                whole = plain(targets.ids[i : i + 1, :position]).logits[0, -1].softmax(-1)
            rest = whole.index_fill(0, torch.tensor(token), 0.0)
            lowered = rest / rest.sum() * (1 - short[token])
            lowered[token] = short[token]
            p = (short + lowered) / 2
            torch.testing.assert_close(proxy[i, k].double().exp(), p, atol=1e-6, rtol=1e-5)


def test_the_edit_forgets_from_attacked_prefixes_too(neo):
    model, targets = neo
    before = state_of(model)
    edit = mc.unlearn(model, targets, CONTROL, **DEEPLY, em_below=3)
    assert same_state(before, state_of(model))
    assert edit.stopped == "em"
    assert mc.unlearn(model, targets, CONTROL, **DEEPLY, em_below=0).stopped == "steps"
    assert float(edit.history["em"][0]) == targets.n_continuation
    with edit.apply(model):
        for seed, attack in enumerate(ATTACKS.values()):
            attacked = attack(targets, CONTROL, 32, generator(100 + seed))
            assert int(mc.scan(model, attacked, progress=False).em.max()) < 3
        assert int(mc.scan(model, targets, progress=False).em.max()) < 3
    again = mc.unlearn(model, targets, CONTROL, **DEEPLY, em_below=3)
    assert all(torch.equal(edit.deltas[name], again.deltas[name]) for name in edit.deltas)


def test_with_a_twin_the_model_comes_nearer_to_it(neo):
    model, targets = neo
    twin = zoo.bridge("gpt_neo", seed=1)
    reference = ReferenceDistribution.of(adapt(twin), targets, None).log_p

    def distance():
        with torch.no_grad():
            current = continuation_log_probs(adapt(model), targets)
        return float(kl_divergence(reference, current).mean())

    before = distance()
    edit = mc.unlearn(model, targets, CONTROL, twin=twin, **DEEPLY)
    assert edit.provenance.options["twin"]
    with edit.apply(model):
        assert distance() < 0.7 * before


def test_the_distance_counts_the_true_tokens_beside_the_whole_distribution():
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]])
    q = torch.tensor([[[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]]])
    true = torch.tensor([[1, 1]])
    kl = (p * (p / q).log()).sum(-1)
    memory = torch.tensor([[math.log(2), math.log(0.8 / 0.6)]])  # one above p, one below

    def distance(weight):
        fields = SimpleNamespace(token_weight=weight)
        return DeepObjective._distance(fields, p.log(), q.log(), true)

    torch.testing.assert_close(distance(0.0), kl.mean(-1))
    torch.testing.assert_close(distance(3.0), (kl + 3 * memory).mean(-1))


def test_fewer_bits_are_left_when_the_true_tokens_count(neo):
    model, targets = neo
    twin = zoo.bridge("gpt_neo", seed=1)

    def bits_left(weight):
        recipe = dataclasses.replace(STRONG, token_weight=weight, learning_rate=2e-2)
        edit = mc.unlearn(model, targets, CONTROL, twin=twin, **DEEPLY | {"recipe": recipe})
        with edit.apply(model):
            nll = mc.scan(model, targets, progress=False).nll
        return float((never - nll).abs().mean())

    never = mc.scan(twin, targets, progress=False).nll
    assert bits_left(1.0) < bits_left(0.0)


def test_a_fraction_of_the_weights_changes_and_no_other(neo):
    model, targets = neo
    edit = mc.unlearn(model, targets, CONTROL, **DEEPLY | {"fraction": 0.05})
    assert edit.n_masked == round(0.05 * edit.n_candidates)
    random = mc.unlearn(model, targets, CONTROL, **DEEPLY | {"fraction": 0.05}, mask="random")
    key = max(edit.indices, key=lambda name: len(edit.indices[name]))
    assert edit.indices[key].tolist() != random.indices.get(key, torch.tensor([])).tolist()


def test_a_budget_ends_the_search(neo):
    model, targets = neo
    free = mc.unlearn(model, targets, CONTROL, **DEEPLY)
    budget = float(free.history["kl"][-1]) / 4
    edit = mc.unlearn(model, targets, CONTROL, **DEEPLY, kl_budget=budget)
    assert edit.stopped == "kl"
    assert float(edit.history["kl"][edit.kept]) <= budget
    assert math.isnan(float(free.history["kl"][0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "middle"}, "depth: 'middle'"),
        ({"depth": "surface", "twin": "gpt_neo"}, "twin: given"),
        ({"fraction": 0}, "fraction: 0"),
        ({"recipe": dataclasses.replace(DEEP, curvature="full")}, "recipe: reference with"),
    ],
)
def test_wrong_options_are_refused(neo, options, message):
    model, targets = neo
    if "twin" in options:
        options = options | {"twin": zoo.bridge("gpt_neo", seed=1)}
    with pytest.raises(InputError, match=message):
        mc.unlearn(model, targets, CONTROL, progress=False, **options)


def test_an_edit_to_another_text_needs_another_objective(neo):
    model, targets = neo
    with pytest.raises(InputError, match="recipe: reference"):
        mc.edit(model, targets[:1], CONTROL[:1], CONTROL[1:], recipe=DEEP, progress=False)
