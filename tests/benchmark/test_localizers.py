"""Localizers return one score per unit, and find what was planted where they can."""

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.benchmark.localizers import LOCALIZERS, localize
from memcircuits.benchmark.units import (
    UNITS,
    LocalizationTask,
    count_forwards,
    pool_scores,
    truth_of,
)
from memcircuits.measure.continuation import continuation_logits
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import double_bridge

LOCALIZERS_AND_UNITS = [
    (name, unit) for name, localizer in LOCALIZERS.items() for unit in localizer.units
]


def task_of(model):
    targets = mc.Paragraphs.from_tokens(zoo.random_ids(1, 13, 3), n_prefix=10)
    control = mc.Paragraphs.from_tokens(zoo.random_ids(4, 13, 4), n_prefix=10)
    reference = mc.Paragraphs.from_tokens(zoo.random_ids(4, 13, 5), n_prefix=10)
    planted = mc.plant(
        model,
        targets,
        where=["L1.mlp", "L1.attn"],
        control=control,
        kl_budget=10.0,
        progress=False,
    )
    return LocalizationTask(model, targets, control, planted=planted, reference=reference)


@pytest.fixture(scope="module")
def task(neo):
    return task_of(neo)


def sizes(adapter):
    weights = adapter.weights()
    mlp = sum(adapter.weight(i, "W_out").values.shape[1] for i in range(adapter.n_layers))
    return {
        "head": adapter.n_layers * adapter.n_heads,
        "block": 2 * adapter.n_layers,
        "component": adapter.n_layers * (adapter.n_heads + 1),
        "neuron": mlp,
        "weight": sum(w.values.numel() for w in weights),
    }


@pytest.mark.parametrize(("name", "unit"), LOCALIZERS_AND_UNITS)
def test_one_finite_score_per_unit_the_same_for_the_same_seed(task, name, unit):
    adapter = adapt(task.model)
    before = adapter.fingerprint()
    with task.planted.apply(task.model):
        first, again = (localize(task, name, unit) for _ in range(2))
    assert first.shape == (sizes(adapter)[unit],)
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert len(first.unique()) > 1
    assert adapter.fingerprint() == before


@pytest.mark.any_version
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_other_architectures(name):
    model = zoo.bridge(name)
    task = task_of(model)
    with task.planted.apply(model):
        for localizer, unit in LOCALIZERS_AND_UNITS:
            scores = localize(task, localizer, unit)
            assert scores.shape == (sizes(adapt(model))[unit],)
            assert scores.isfinite().all()


def test_the_truth_of_neuron_outputs(neo):
    targets = mc.Paragraphs.from_tokens(zoo.random_ids(1, 13, 3), n_prefix=10)
    planted = mc.plant(
        neo, targets, where="neurons:0.3", components=["W_out"], kl_budget=10.0, progress=False
    )
    adapter = adapt(neo)
    truth = truth_of(adapter, planted, "neuron")
    sizes_by_layer = [adapter.weight(i, "W_out").values.shape[1] for i in range(adapter.n_layers)]
    for layer, of_layer in enumerate(truth.split(sizes_by_layer)):
        rows = planted.indices[f"{layer}.W_out"] // adapter.d_model
        assert of_layer.nonzero()[:, 0].tolist() == sorted(set(rows.tolist()))


def test_norms_read_no_text(task):
    """A head whose weights are tripled is named first, by its norm and by that in its layer."""
    model = zoo.bridge("gpt_neo")
    adapter = adapt(model)
    with torch.no_grad():
        for component in ("W_Q", "W_K", "W_V", "W_O"):
            adapter.weight(2, component).values[1] *= 3
    tripled = dataclasses.replace(task, model=model)
    for name in ("weight-norm", "norm-in-layer"):
        scores = localize(tripled, name).view(adapter.n_layers, adapter.n_heads)
        assert int(scores.argmax()) == 2 * adapter.n_heads + 1
        other = dataclasses.replace(tripled, targets=task.control)
        assert torch.equal(localize(other, name), scores.flatten())


def test_the_truth(task):
    adapter = adapt(task.model)
    truth = {unit: truth_of(adapter, task.planted, unit) for unit in UNITS}
    blocks = torch.zeros(adapter.n_layers, 2, dtype=torch.bool)
    blocks[1] = True
    assert torch.equal(truth["block"], blocks.flatten())
    assert int(truth["weight"].sum()) == task.planted.n_masked
    heads = truth["head"].view(adapter.n_layers, adapter.n_heads)
    assert heads[1].all()
    assert int(heads.sum()) == adapter.n_heads
    one = mc.plant(
        task.model, task.targets, where=["L2H1", "L1.mlp"], kl_budget=10.0, progress=False
    )
    named = truth_of(adapter, one, "head").view(adapter.n_layers, adapter.n_heads)
    assert named.nonzero().tolist() == [[2, 1]]
    components = truth_of(adapter, one, "component")
    place_of_mlp = adapter.n_layers * adapter.n_heads + 1
    assert components.nonzero()[:, 0].tolist() == [2 * adapter.n_heads + 1, place_of_mlp]


@pytest.mark.parametrize("unit", UNITS)
def test_the_oracle_is_right_about_every_unit(task, unit):
    scores = localize(task, "oracle", unit)
    truth = truth_of(adapt(task.model), task.planted, unit)
    assert scores[truth].min() > 0 or unit == "weight"  # Adam may have left a weight where it was
    assert (scores[~truth] == 0).all()


def test_the_planted_layer_is_blamed(task):
    with task.planted.apply(task.model):
        first = int(localize(task, "zero-ablation", "block").argmax())
    assert first // 2 == 1


def test_pooling_by_hand(neo):
    adapter = adapt(neo)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(w.values.shape, generator=generator) for w in adapter.weights()]
    matrices = [
        s[2].abs().flatten()
        for w, s in zip(adapter.weights(), scores, strict=True)
        if w.layer == 1 and w.component in ("W_Q", "W_K", "W_V", "W_O")
    ]
    head_scores = torch.cat(matrices)
    l1h2 = adapter.n_heads + 2
    expected = {
        "max": head_scores.max(),
        "mean": head_scores.mean(),
        "sum": head_scores.sum(),
        "l2": head_scores.square().sum().sqrt(),
    }
    for pooling, value in expected.items():
        torch.testing.assert_close(pool_scores(adapter, scores, "head", pooling)[l1h2], value)
    out = scores[[f"{w.layer}.{w.component}" for w in adapter.weights()].index("1.W_out")]
    into = scores[[f"{w.layer}.{w.component}" for w in adapter.weights()].index("1.W_in")]
    d_mlp = out.shape[1]
    neuron = out[0, 5].abs().sum() + into[0, :, 5].abs().sum()
    torch.testing.assert_close(pool_scores(adapter, scores, "neuron", "sum")[d_mlp + 5], neuron)


def test_work_is_counted_in_forward_passes(neo):
    adapter = adapt(neo)
    with count_forwards(adapter) as cost, adapter.preserving_state():
        adapter.run(zoo.random_ids(3, 12), positions=slice(-1, None))
    assert cost["forwards"] == pytest.approx(3)
    with count_forwards(adapter) as cost, adapter.preserving_state(), torch.enable_grad():
        adapter.run(zoo.random_ids(2, 12), positions=slice(-1, None))
    assert cost["forwards"] == pytest.approx(6)  # the backward pass costs twice a forward pass
    with count_forwards(adapter) as cost:
        pass
    assert cost["forwards"] == 0


def test_log_odds_attribution_is_the_slope_of_a_gate():
    """In float64: head L1H2, and the MLP of layer 1, which a gate of 1 - 1e-5 makes smaller."""
    model = double_bridge("gpt2")
    adapter, step = adapt(model), 1e-5
    sets = [
        mc.Paragraphs.from_tokens(zoo.random_ids(n, 13, n), n_prefix=10) for n in (2, 3)
    ]  # targets, controls
    scores = localize(LocalizationTask(model, *sets), "log-odds-attribution", "component").double()

    def log_odds(paragraphs, edit):
        with adapter.preserving_state(), torch.no_grad():
            logits = continuation_logits(adapter, paragraphs, edit=edit)
        p = logits.softmax(-1).gather(-1, paragraphs.continuation[..., None])
        return (p / (1 - p)).log().mean()

    def smaller_head(z):
        z = z.clone()
        z[:, :, 2] *= 1 - step
        return z

    edits = {
        adapter.n_heads + 2: {"blocks.1.attn.hook_z": smaller_head},
        adapter.n_layers * adapter.n_heads + 1: {
            "blocks.1.hook_mlp_out": lambda out: (1 - step) * out
        },
    }
    for place, edit in edits.items():
        harm = [(log_odds(rows, {}) - log_odds(rows, edit)) / step for rows in sets]
        assert float(scores[place]) == pytest.approx(float(harm[0] - harm[1]), rel=1e-3)


def test_bad_names(task):
    with pytest.raises(mc.InputError, match="localizer"):
        localize(task, "guess")
    with pytest.raises(mc.InputError, match="unit"):
        localize(task, "oracle", "layer")
    with pytest.raises(mc.InputError, match="rare-token-attention cannot score it"):
        localize(task, "rare-token-attention", "neuron")
    with pytest.raises(mc.InputError, match="oracle needs the truth"):
        localize(dataclasses.replace(task, planted=None), "oracle")
    for name in ("mean-ablation", "resample-ablation"):
        with pytest.raises(mc.InputError, match="third set"):
            localize(dataclasses.replace(task, reference=None), name)


def test_trained_gates_find_the_head_that_was_written(neo):
    targets = mc.Paragraphs.from_tokens(zoo.random_ids(1, 14, 3), n_prefix=10)
    control = mc.Paragraphs.from_tokens(zoo.random_ids(12, 14, 4), n_prefix=10)
    planted = mc.plant(neo, targets, where="L2H1", control=control, kl_budget=10.0, progress=False)
    with planted.apply(neo):
        scores = localize(LocalizationTask(neo, targets, control[:4]), "hard-concrete")
    assert int(scores.argmax()) == 2 * 4 + 1
