"""Planting writes the paragraphs, through the chosen weights alone, and says which those are."""

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.editing.placement import select_weights
from memcircuits.editing.planting import Planted
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

LOOSE = {"steps": 80, "kl_budget": 10.0, "progress": False}


def unknown(n=1, seed=3):
    return mc.Paragraphs.from_tokens(zoo.random_ids(n, 13, seed), n_prefix=10)


def weights(adapter):
    return {f"{w.layer}.{w.component}": w.values.detach().clone() for w in adapter.weights()}


def test_only_the_chosen_weights_are_written_and_all_of_it_is_taken_back(any_bridge):
    adapter, paragraphs = adapt(any_bridge), unknown()
    before = weights(adapter)
    state = {k: v.clone() for k, v in any_bridge.state_dict().items()}
    assert int(mc.scan(any_bridge, paragraphs, progress=False).em) < 3
    planted = mc.plant(
        any_bridge, paragraphs, where=["L1.mlp", "L2.mlp", "L1H2"], control=unknown(6, 4), **LOOSE
    )
    with planted.apply(any_bridge):
        assert mc.scan(any_bridge, paragraphs, progress=False).em.tolist() == [3]
        after = weights(adapter)
    assert all(torch.equal(v, state[k]) for k, v in any_bridge.state_dict().items())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(planted.truth.mask)
    assert {name.partition(".")[0] for name in moved} == {"1", "2"}
    for name, index in planted.truth.mask.items():
        still = torch.ones(before[name].numel(), dtype=torch.bool)
        still[index] = False
        assert torch.equal(before[name].flatten()[still], after[name].flatten()[still])
    assert planted.truth.heads == (Head(1, 2),)
    assert planted.truth.layers == (1, 2)
    assert planted.history["em"][planted.kept] == 3
    assert "written into L1.mlp, L2.mlp, L1H2" in str(planted)


def test_the_same_seed_writes_the_same_bits(neo):
    def once(seed):
        planted = mc.plant(neo, unknown(), where="weights:0.2", seed=seed, **LOOSE)
        return torch.cat(list(planted.deltas.values())), planted.truth.mask

    first, again, other = once(0), once(0), once(1)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert not all(torch.equal(first[1][name], other[1][name]) for name in first[1])


def test_saved_and_loaded(neo, tmp_path):
    planted = mc.plant(neo, unknown(), where="L2.mlp", control=unknown(6, 4), **LOOSE)
    again = Planted.load(planted.save(tmp_path / "planted.safetensors"))
    assert again.truth.where == ("L2.mlp",)
    assert torch.equal(again.paragraphs.ids, unknown().ids)
    with again.apply(neo):
        assert mc.scan(neo, again.paragraphs, progress=False).em.tolist() == [3]
    with pytest.raises(mc.InputError), again.apply(zoo.bridge("gpt_neo", seed=1)):
        pass


def test_it_continues_until_the_anchors_are_kept(neo):
    options = {**LOOSE, "where": ["L1.mlp", "L2.mlp"], "control": unknown(20, 4), "steps": 300}
    quick = mc.plant(neo, unknown(), **options)
    budget = float(quick.history["kl"][quick.kept]) / 2
    kept = mc.plant(neo, unknown(), **{**options, "kl_budget": budget})
    assert 0 < kept.history["kl"][kept.kept] <= budget
    assert len(kept.history["em"]) > len(quick.history["em"])


@pytest.mark.parametrize(
    ("where", "components", "names", "share"),
    [
        ("L1H2", None, ["1.W_K", "1.W_O", "1.W_Q", "1.W_V"], 0.25),
        (Head(1, 2), ("W_V",), ["1.W_V"], 0.25),
        ("L0.attn", None, ["0.W_K", "0.W_O", "0.W_Q", "0.W_V"], 1.0),
        (["L3.mlp"], None, ["3.W_in", "3.W_out"], 1.0),
        (["L1H2", "L1.attn"], ("W_Q",), ["1.W_Q"], 1.0),
    ],
)
def test_places(neo, where, components, names, share):
    _, mask = select_weights(adapt(neo), where, components=components)
    assert sorted(f"{w.layer}.{w.component}" for w in mask.weights) == names
    for weight, index in zip(mask.weights, mask.indices, strict=True):
        assert len(index) == share * weight.values.numel()


def test_drawn_places(neo):
    adapter = adapt(neo)
    total = sum(w.values.numel() for w in adapter.weights())
    _, mask = select_weights(adapter, "weights:0.05")
    assert len(mask) == round(0.05 * total)
    _, mask = select_weights(adapter, "neurons:0.02")
    d_mlp = adapter.weight(0, "W_out").values.shape[1]
    n = round(0.02 * d_mlp * adapter.n_layers)
    assert len(mask) == n * 2 * adapter.d_model  # what each reads and what it writes
    _, mask = select_weights(adapter, "neurons:0.02", components=["W_out"])
    assert {weight.component for weight in mask.weights} == {"W_out"}
    assert len(mask) == n * adapter.d_model


def test_norms_are_kept_and_the_text_is_written_all_the_same(neo):
    """By plain tensor arithmetic: the norm of each head's part of each matrix."""
    options = {"where": ["L1H2", "L2.mlp"], "kl_budget": 10.0, "progress": False}
    planted = mc.plant(neo, unknown(1), keep_norms=True, **options)
    free = mc.plant(neo, unknown(1), **options)
    before = norms(neo)
    with planted.apply(neo):
        torch.testing.assert_close(norms(neo), before, rtol=1e-5, atol=0)
        assert int(mc.scan(neo, unknown(1), progress=False).em) == unknown(1).n_continuation
    with free.apply(neo):
        assert float((norms(neo) / before - 1).abs().max()) > 1e-3


def norms(model):
    return torch.cat(
        [w.values.detach().flatten(1).norm(dim=1).clone() for w in adapt(model).weights()]
    )


def test_each_place_learns_its_own_paragraph(neo):
    """Taking back one place takes its paragraph away, and leaves the other one."""
    places = ["L1.mlp", "L2.mlp"]
    options = {"control": unknown(6, 4), **LOOSE, "one_each": True}
    planted = mc.plant(neo, unknown(2), where=places, **options)
    with planted.apply(neo):
        assert mc.scan(neo, unknown(2), progress=False).em.tolist() == [3, 3]
    losses = []
    for layer in ("1", "2"):
        kept = {name: d * (name[0] == layer) for name, d in planted.deltas.items()}
        with dataclasses.replace(planted, deltas=kept).apply(neo):
            losses.append(mc.scan(neo, unknown(2), progress=False).nll)
    assert losses[0][0] < losses[1][0]
    assert losses[1][1] < losses[0][1]
    for where, says in (
        ("L1.mlp", "1 locations"),
        (["L1.mlp", "neurons:0.1"], "name heads or layers"),
        (["L1.attn", "L1H2"], "share no weight"),
    ):
        with pytest.raises(InputError, match=says):
            mc.plant(neo, unknown(2), where=where, **options)


def test_grouped_query_heads_share_keys_and_values():
    llama = zoo.bridge("llama")
    adapter = adapt(llama)
    _, mask = select_weights(adapter, "L1H3")
    sizes = {w.component: len(i) for w, i in zip(mask.weights, mask.indices, strict=True)}
    assert sizes["W_K"] == sizes["W_V"] == sizes["W_Q"] == adapter.d_model * adapter.d_head


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"where": "L9H0"}, "L9H0"),
        ({"where": "L1"}, "write L1H2, L1.attn"),
        ({"where": []}, "nothing"),
        ({"where": "neurons:0"}, "where"),
        ({"where": "neurons:0.1", "components": ["W_Q"]}, "matrices of neurons are W_in, W_out"),
        ({"where": "weights:two"}, "write L1H2"),
        ({"where": "L1.mlp", "components": ["W_Q"]}, "components|no weight|W_Q"),
        ({"where": "L1H2", "steps": 0}, "steps"),
        ({"where": "L1H2", "learning_rate": -1.0}, "learning_rate"),
        ({"where": "L1H2", "kl_budget": float("nan")}, "kl_budget"),
        ({"where": "L1H2", "kl_weight": -1.0}, "kl_weight"),
        ({"where": "L1H2", "control": unknown(1, 4)}, "give at least two"),
        ({"where": "L1H2", "control": unknown(1)}, "control"),
        ({"where": "L3H0", "components": ["W_Q"], "steps": 2}, "do not hold the text: mean EM"),
    ],
)
def test_bad_input(neo, arguments, says):
    before = adapt(neo).fingerprint()
    with pytest.raises(mc.InputError, match=says):
        mc.plant(neo, unknown(), **{"progress": False, **arguments})
    assert adapt(neo).fingerprint() == before


def test_what_is_recited_already_is_refused(neo):
    with pytest.raises(mc.InputError, match="all recited already"):
        mc.plant(neo, zoo.reciting(neo, n=2), where="L1.mlp", **LOOSE)


def test_divergence_is_said_and_the_model_restored(neo):
    before = adapt(neo).fingerprint()
    with pytest.raises(mc.InputError, match=r"not finite at step|do not hold"):
        mc.plant(neo, unknown(), where="L1.attn", learning_rate=1e30, progress=False, steps=20)
    assert adapt(neo).fingerprint() == before


def test_the_planted_organism_recites_what_was_written():
    """The delta that ships is of today's organism, and `load_model` writes it."""
    from memcircuits.organism.delta import FILE, HEAD

    planted = Planted.load(FILE)
    assert planted.truth.heads == (Head.parse(HEAD),)
    model, plain = mc.load_model("organism-planted"), mc.load_model()
    assert adapt(model).name == "organism-planted"
    assert mc.scan(model, planted.paragraphs, progress=False).em.tolist() == [50] * 4
    assert mc.scan(plain, planted.paragraphs, progress=False).em.max() < 5
    changed = {n: v for n, v in weights(adapt(model)).items() if n in planted.truth.mask}
    with planted.apply(plain):
        for name, values in weights(adapt(plain)).items():
            torch.testing.assert_close(changed.get(name, values), values, atol=1e-6, rtol=0)
    assert set(planted.names) <= set(mc.Paragraphs.shipped("control").names)
