"""Influence: dot products of gradients, plain SGD on a transformers copy, planted near copies."""

from __future__ import annotations

import copy

import pytest
import torch

import memcircuits as mc
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import same_state, state_of
from tests.helpers.gradients import double_bridge, relative_error
from tests.helpers.oracle import Plain

ROWS = mc.Paragraphs.from_tokens(zoo.random_ids(4, 22, seed=1), n_prefix=10)
TESTED = mc.Paragraphs.from_tokens(zoo.random_ids(3, 22, seed=2), n_prefix=10)


def plain_log_prob(model, paragraphs):
    """Log p of each whole continuation, by transformers."""
    ids, n = paragraphs.inputs, paragraphs.n_given
    log_p = model(ids).logits[:, n - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, ids[:, n:, None])[..., 0].sum(-1)


def matrices(name, model):
    """The weight matrices of attention and MLPs, by transformers' own names."""
    kept = []
    Plain(name, model).weights(lambda parameter: kept.append(parameter) or parameter)
    return list({id(p): p for p in kept}.values())


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_one_step_of_sgd_on_a_transformers_copy(name):
    bridge, eta = double_bridge(name), 1e-3
    result = mc.influence(bridge, ROWS, TESTED, eta, progress=False)
    plain = zoo.hf_model(name).double()
    with torch.no_grad():
        before = plain_log_prob(plain, TESTED)
    for i, row in enumerate(ROWS):
        trained = copy.deepcopy(plain).requires_grad_(True)
        optimizer = torch.optim.SGD(matrices(name, trained), lr=eta)
        (-plain_log_prob(trained, row).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            alpha = plain_log_prob(trained, TESTED) - before
        assert relative_error(result.values[i].double(), alpha) < 1e-5


@pytest.mark.parametrize("where", [None, "L1H2", ["L0.mlp", (2, 1)]])
def test_small_steps_are_dot_products_of_gradients(where):
    bridge, eta = double_bridge("gpt2"), 1e-7
    plain = Plain("gpt2", zoo.hf_model("gpt2").double())
    vectors = []
    for row in (*ROWS, *TESTED):
        gradients = plain.gradients(row.ids, 10)
        # The mean NLL of 12 tokens: log p of all is its gradient times -12.
        parts = []
        for component, layers in gradients.items():
            for layer, gradient in enumerate(layers):
                is_attention = component in ("W_Q", "W_K", "W_V", "W_O")
                if where is None or (where != "L1H2" and layer == 0 and not is_attention):
                    parts.append(-12 * gradient.flatten())
                heads = [(1, 2)] if where == "L1H2" else [(2, 1)]
                if where is not None and is_attention:
                    parts += [-12 * gradient[h].flatten() for at, h in heads if at == layer]
        vectors.append(torch.cat(parts))
    trained, tested = torch.stack(vectors[:4]), torch.stack(vectors[4:])
    result = mc.influence(bridge, ROWS, TESTED, eta, where=where, progress=False)
    assert relative_error(result.values.double() / eta, trained @ tested.T) < 1e-4
    assert relative_error(result.gradient_norms.double(), trained.norm(dim=1)) < 1e-4


def test_values_do_not_depend_on_the_class():
    if not zoo.has_hooked():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    ours = mc.influence(zoo.bridge("gpt2"), ROWS, TESTED, 1e-4, progress=False)
    hooked = mc.influence(zoo.hooked("gpt2"), ROWS, TESTED, 1e-4, progress=False)
    assert relative_error(hooked.values, ours.values) < 1e-3


def test_the_model_is_put_back_also_after_an_interruption(monkeypatch):
    bridge = zoo.bridge("gpt2")
    before, fingerprint = state_of(bridge), adapt(bridge).fingerprint()
    mc.influence(bridge, ROWS, eta=0.1, progress=False)
    assert same_state(state_of(bridge), before)
    assert adapt(bridge).fingerprint() == fingerprint
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 2:  # the score of the tested rows after the first step
            raise KeyboardInterrupt
        return measure(*args)

    from memcircuits.evidence import influence as module

    measure = module.continuation_logits
    monkeypatch.setattr(module, "continuation_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mc.influence(bridge, ROWS, eta=0.1, progress=False)
    assert same_state(state_of(bridge), before)


def test_unlearning_is_the_opposite_of_learning():
    bridge = double_bridge("gpt2")
    up = mc.influence(bridge, ROWS, eta=1e-7, progress=False)
    down = mc.influence(bridge, ROWS, eta=-1e-7, progress=False)
    assert relative_error(down.values, -up.values) < 1e-3


def test_own_influence_per_step_is_the_largest_of_its_column():
    """By Cauchy and Schwarz, for small steps."""
    result = mc.influence(double_bridge("gpt2"), ROWS, eta=1e-7, progress=False)
    assert result.per_step_length.argmax(0).tolist() == [0, 1, 2, 3]
    assert result.teachers()["own_rank"].tolist() == [1, 1, 1, 1]


@pytest.mark.any_version
def test_the_near_copy_of_a_recitation_is_named_as_its_teacher():
    """Candidates: copies of recitations with every twentieth token replaced, and other texts.

    Not of texts that training saw more than 32 times: a step on a copy hardly changes those.
    """
    model = mc.load_model()
    recited = mc.scan(model, mc.Paragraphs.shipped("planted"), progress=False).memorized
    doses = recited.metadata["repetitions"]
    recited = recited[[i for i, dose in enumerate(doses) if dose <= 32][::16]]
    assert len(recited) >= 5
    near = recited.ids.clone()
    near[:, 2::20] = mc.Paragraphs.shipped("control").ids[: len(near), 2::20]
    candidates = mc.Paragraphs(near, names=tuple(f"copy of {n}" for n in recited.names))
    candidates = candidates + mc.Paragraphs.shipped("control")[::90]
    teachers = mc.influence(model, candidates, recited, progress=False).teachers()
    assert teachers["teacher"].tolist() == [f"copy of {name}" for name in teachers["tested"]]


def test_pieces_of_the_prefix_on_tokens_of_the_continuation():
    bridge, eta = double_bridge("gpt2"), 1e-3
    result = mc.influence(bridge, ROWS[:2], eta=eta, within=True, piece=4, stride=3, progress=False)
    assert result.trained == ("1-4", "4-7")
    assert result.tested == tuple(map(str, range(10, 22)))
    plain = zoo.hf_model("gpt2").double()
    piece = mc.Paragraphs(ROWS.ids[1:2, :8], n_prefix=4)

    def token_log_probs(model):
        log_p = model(ROWS.ids[1:2]).logits[:, 9:-1].log_softmax(-1)
        return log_p.gather(-1, ROWS.ids[1:2, 10:, None])[0, :, 0]

    with torch.no_grad():
        before = token_log_probs(plain)
    trained = copy.deepcopy(plain).requires_grad_(True)
    optimizer = torch.optim.SGD(matrices("gpt2", trained), lr=eta)
    (-plain_log_prob(trained, piece).sum()).backward()
    optimizer.step()
    with torch.no_grad():
        alpha = token_log_probs(trained) - before
    samples = result.samples["influence"]
    assert relative_error(samples[1, 1].double(), alpha) < 1e-5
    torch.testing.assert_close(result.values, samples.mean(0))


def test_rank_correlation_leaves_out_the_row_itself():
    result = mc.influence(zoo.bridge("gpt2"), ROWS, progress=False)
    harm = result.values.clone()
    harm.fill_diagonal_(-1e9)
    assert result.rank_correlation(harm)[0] == pytest.approx(1.0)
    assert result.rank_correlation(-harm)[0] == pytest.approx(-1.0)
    assert torch.isnan(torch.tensor(result.rank_correlation(torch.zeros(4, 4)))).all()


def test_copies_of_a_row_count_once_and_do_not_test_it():
    copies = ROWS[[0, 1, 2, 3, 0, 0]]
    result = mc.influence(zoo.bridge("gpt2"), copies, ROWS, progress=False)
    assert result.groups["trained"].tolist() == [0, 1, 2, 3, 0, 0]
    assert result.groups["tested"].tolist() == [0, 1, 2, 3]
    assert "6 trained paragraphs are 4 independent groups" in result.notes[0]
    harm = result.values.clone()
    harm[range(6), [0, 1, 2, 3, 0, 0]] = -1e9  # on a row's own text: must not matter
    harm[0], harm[4], harm[5] = -harm[0], -harm[4], -harm[5]
    mean, low, high = result.rank_correlation(harm)
    assert mean == pytest.approx((3 - 1) / 4)  # by rows it would be (3 - 3) / 6
    assert low < mean < high == pytest.approx(1)
    longer = mc.Paragraphs.from_tokens(zoo.random_ids(3, 25, seed=2), n_prefix=12)
    for tested in (TESTED, longer):
        others = mc.influence(zoo.bridge("gpt2"), ROWS, tested, progress=False)
        assert not torch.isin(others.groups["tested"], others.groups["trained"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0}, "eta: 0"),
        ({"where": "L9H9"}, "where: L9H9"),
        ({"where": "L9.mlp"}, "where: L9.mlp"),
        ({"where": []}, "where"),
        ({"within": True, "tested": ROWS}, "tested"),
        ({"within": True}, "prefixes of 10 tokens; they must be longer than a piece of 12"),
    ],
)
def test_bad_input_is_refused(neo, options, message):
    with pytest.raises(mc.InputError, match=message):
        mc.influence(neo, ROWS, **options, progress=False)
