"""Transplants equal plain copies of weights, cover all parameters, and leave both models alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError, UnsupportedModel
from memcircuits.editing.planting import Planted
from memcircuits.evidence.transplants.components import (
    HEAD_MATRICES,
    UNITS,
    NeuronOrder,
    components_of,
    patches_of,
    transplanted,
)
from memcircuits.evidence.transplants.results import Transplant
from memcircuits.models.exchange import Patch, exchanged
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from memcircuits.organism.delta import FILE
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain


def sources(name: str) -> tuple[Any, Any]:
    """Two transformers models of one architecture in float64."""
    return tuple(zoo.shaken(zoo.hf_model(name, seed=i), seed=i).double() for i in (0, 1))


def bridges(name: str) -> tuple[Any, Any]:
    return tuple(as_bridge(s, zoo.tokenizer(), name=f"tiny-{name}") for s in sources(name))


def expanded(source: Any) -> Any:
    """A Llama in which heads share keys and values, as one in which every head has its own."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(source.config)
    shared = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    model = LlamaForCausalLM(config).double().eval()
    model.set_attn_implementation("eager")
    state = dict(source.state_dict())
    for key, value in state.items():
        if "k_proj.weight" in key or "v_proj.weight" in key:
            heads = value.unflatten(0, (-1, value.shape[0] * shared // config.num_attention_heads))
            state[key] = heads.repeat_interleave(shared, 0).flatten(0, 1)
    model.load_state_dict(state)
    return model


def plain_effects(name: str, receiver: Any, donor: Any, paragraphs: mc.Paragraphs, unit: str):
    """NLL [row, layer, head] after a plain copy of a head's matrices, minus that before."""
    copied = Plain(name, copy.deepcopy(receiver))
    own, other = (x.weights(lambda p: p.detach()) for x in (copied, Plain(name, donor)))
    result = torch.empty(len(paragraphs), copied.n_layers, copied.n_heads, dtype=torch.float64)

    def nll():
        logits = copied.logits(paragraphs.ids)[:, paragraphs.n_prefix - 1 : -1]
        log_prob = logits.log_softmax(-1).gather(-1, paragraphs.continuation[..., None])
        return -log_prob[..., 0].mean(-1)

    with torch.no_grad():
        clean = nll()
        for layer in range(copied.n_layers):
            for head in range(copied.n_heads):
                kept = {c: own[c][layer][head].clone() for c in HEAD_MATRICES[unit]}
                for component in kept:
                    own[component][layer][head] = other[component][layer][head]
                result[:, layer, head] = nll() - clean
                for component, values in kept.items():
                    own[component][layer][head] = values
    return result


@pytest.mark.parametrize("unit", sorted(HEAD_MATRICES))
@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_a_transplanted_head_is_a_plain_copy_of_its_weights(name, unit):
    """Joint matrices of queries, keys and values, and shared keys and values, among them."""
    pair = sources(name)
    paragraphs = zoo.mixed(zoo.bridge(name), n=2)
    plain = [expanded(s) for s in pair] if name == "llama" else [copy.deepcopy(s) for s in pair]
    model, twin = (as_bridge(s, zoo.tokenizer(), name=f"tiny-{name}") for s in pair)
    result = mc.transplant(model, twin, paragraphs, units=[unit])
    necessity = plain_effects(name, *plain, paragraphs, unit)
    sufficiency = -plain_effects(name, *plain[::-1], paragraphs, unit)
    for measure, expected in (("necessity", necessity), ("sufficiency", sufficiency)):
        samples = result.map(measure, unit).samples[measure].double()
        torch.testing.assert_close(samples, expected, atol=2e-6, rtol=0)
        assert expected.abs().amax((0, 2)).min() > 1e-5  # every layer has an effect


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_all_components_turn_the_twin_into_the_model(name):
    model, twin = zoo.bridge(name), zoo.bridge(name, seed=1)
    paragraphs = zoo.mixed(model, n=2)
    own, other = mc.scan(model, paragraphs), mc.scan(twin, paragraphs)
    before = adapt(twin).fingerprint()
    heads = [f"L{layer}H{head}" for layer in range(adapt(model).n_layers) for head in range(4)]
    mlps = [f"L{layer}.mlp" for layer in range(adapt(model).n_layers)]
    halves = [f"{head}.{half}" for head in heads for half in ("qk", "ov")]
    neurons = [f"{mlp.removesuffix('mlp')}neurons{i}" for mlp in mlps for i in range(3)]
    layers = [f"L{layer}" for layer in range(adapt(model).n_layers)]
    divisions = [["all"], [*layers, "rest"], [*heads, *mlps, "rest"], [*halves, *neurons, "rest"]]
    for names in divisions:
        with transplanted(twin, model, names, neuron_groups=3):
            assert adapt(twin).fingerprint() == adapt(model).fingerprint()
            assert torch.equal(mc.scan(twin, paragraphs).token_log_prob, own.token_log_prob)
    assert adapt(twin).fingerprint() == before
    assert torch.equal(mc.scan(twin, paragraphs).token_log_prob, other.token_log_prob)
    result = mc.transplant(model, twin, paragraphs, units=["all"])
    total = (other.nll - own.nll)[:, None]
    torch.testing.assert_close(result.samples["necessity"], total, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.samples["sufficiency"], total, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_every_unit_equals_the_plain_exchange(name):
    """Whatever is restarted in the middle, against whole runs with the weights written."""
    model, twin = zoo.bridge(name), zoo.bridge(name, seed=1)
    paragraphs = zoo.mixed(model, n=2)
    clean = mc.scan(model, paragraphs)
    result = mc.transplant(model, twin, paragraphs, neuron_groups=2)
    assert tuple(dict.fromkeys(result.units)) == UNITS
    grouped = adapt(model).n_kv_heads < adapt(model).n_heads
    for column, part in enumerate(result.components):
        if grouped and part.head >= 0:
            continue  # writing a head's weights changes its neighbours too
        with transplanted(model, twin, [str(part)], neuron_groups=2):
            changed = mc.scan(model, paragraphs)
        samples = {name: values[:, column] for name, values in result.samples.items()}
        torch.testing.assert_close(samples["necessity"], changed.nll - clean.nll, atol=1e-5, rtol=0)
        assert torch.equal(samples["em_lost"], (clean.em - changed.em).float())
        assert samples["necessity"].abs().max() > 1e-4, part


def test_a_transplant_of_nothing_changes_nothing():
    model, same = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model, n=2)
    result = mc.transplant(model, same, paragraphs)
    assert all((values == 0).all() for values in result.samples.values())
    used = mc.transplant(model, same, paragraphs, patched="activations")
    assert all(values.abs().max() < 1e-5 for values in used.samples.values())
    with transplanted(model, same, []):
        assert adapt(model).fingerprint() == adapt(same).fingerprint()


def test_the_planted_organism_against_itself_gives_the_written_head_and_nothing_else():
    planted, twin = (mc.load_model(name, device="cpu") for name in ("organism-planted", "organism"))
    result = mc.transplant(planted, twin, Planted.load(FILE).paragraphs)
    frame = result.to_frame()
    for measure in ("necessity", "sufficiency"):
        assert result.map(measure).values.nonzero().tolist() == [[3, 5]]
        rows = frame[(frame[measure] != 0) & ~frame["unit"].isin(["qk", "ov"])]
        assert rows["unit"].tolist() == ["head", "attn", "layer", "all"]
        assert rows[f"{measure}_share"].tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert result.total > 1
    assert frame.loc[frame["unit"] == "head", "em_lost"].max() > 40


def plain_activation_effects(receiver: Any, donor: Any, paragraphs: mc.Paragraphs):
    """NLL [row, layer, head] with a head's z from the other model's run of the same text."""
    receiver, donor = Plain("gpt_neo", receiver), Plain("gpt_neo", donor)
    with torch.no_grad():
        clean = receiver.nll(paragraphs.ids, paragraphs.n_prefix)
    new = [z.float() for z in donor.z(paragraphs.ids)]
    return receiver.nll_with_z(paragraphs.ids, paragraphs.n_prefix, new) - clean[:, None, None]


def test_transplanted_activations_equal_plain_hooks():
    pair = [zoo.hf_model("gpt_neo", seed=i) for i in (0, 1)]
    model, twin = (zoo.bridge("gpt_neo", seed=i) for i in (0, 1))
    paragraphs = zoo.mixed(model, n=2)
    result = mc.transplant(model, twin, paragraphs, patched="activations")
    expected = plain_activation_effects(*pair, paragraphs)
    samples = result.map("necessity").samples["necessity"]
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)
    expected = -plain_activation_effects(*pair[::-1], paragraphs)
    samples = result.map("sufficiency").samples["sufficiency"]
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1e-3


def test_the_twins_last_layers_and_the_models_first_are_both_in_part_the_total():
    """With resid_post of the last layer from the other model, only unembedding is the model's."""
    model, twin = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)
    paragraphs = zoo.mixed(model, n=2)
    adapter, other = adapt(model), adapt(twin)
    result = mc.transplant(model, twin, paragraphs, patched="activations", units=["layer"])
    name = "blocks.3.hook_resid_post"
    with torch.no_grad():
        resid = other.run(paragraphs.ids, read=[name]).cache[name]
        log_prob = adapter.unembed(resid)[:, paragraphs.n_prefix - 1 : -1].log_softmax(-1)
        nll = -log_prob.gather(-1, paragraphs.continuation[..., None])[..., 0].mean(-1)
    torch.testing.assert_close(
        result.samples["necessity"][:, -1], nll - mc.scan(model, paragraphs).nll, atol=1e-5, rtol=0
    )


def test_both_models_leave_the_call_as_they_came(monkeypatch):
    model, twin = zoo.bridge("llama"), zoo.bridge("llama", seed=1)
    paragraphs = zoo.mixed(model, n=1)
    before = [adapt(m).fingerprint() for m in (model, twin)]
    calls, stop = [], [-1]
    unembed = type(adapt(model)).unembed

    def interrupt(adapter, resid):
        calls.append(adapter)
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        return unembed(adapter, resid)

    monkeypatch.setattr(type(adapt(model)), "unembed", interrupt)
    mc.transplant(model, twin, paragraphs)
    for at in range(2, len(calls), len(calls) // 3):
        stop[0] = at
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            mc.transplant(model, twin, paragraphs)
        assert [adapt(m).fingerprint() for m in (model, twin)] == before


def test_weights_written_twice_are_restored():
    tensor = torch.arange(4.0)
    patches = [Patch(tensor, torch.ones(4)), Patch(tensor, torch.zeros(4), slice(2))]
    with exchanged(patches):
        assert tensor.tolist() == [0, 0, 1, 1]
    assert tensor.tolist() == [0, 1, 2, 3]


def test_the_first_group_holds_the_neurons_that_differ_most():
    model, twin = bridges("llama")
    adapter, other = adapt(model), adapt(twin)
    for name, index in (("W_in", (0, ..., [5, 9])), ("W_out", (0, [5, 9])), ("W_gate", (0, 0, 3))):
        other.weight(1, name).values[:] = adapter.weight(1, name).values
        other.weight(1, name).values[index] += 1.0
    order = NeuronOrder(adapter, other, 32)
    assert sorted(order.group(1, 0).tolist()) == [5, 9]
    assert 3 in order.group(1, 1).tolist()
    groups = torch.cat([order.group(1, i) for i in range(32)])
    assert sorted(groups.tolist()) == list(range(64))
    parts = [part for part in components_of(adapter, ["neurons"], 32) if part.layer == 1]
    changed = [p for p in parts if any(x.changes for x in patches_of(adapter, other, p, order))]
    assert [part.group for part in changed] == [0, 1]


def test_tables_maps_figure_and_blocks(tmp_path):
    model, twin = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)
    result = mc.transplant(model, twin, zoo.mixed(model, n=3), units=["head", "mlp", "rest"])
    frame = result.to_frame()
    assert frame["unit"].value_counts().to_dict() == {"head": 16, "mlp": 4, "rest": 1}
    assert (frame["necessity_low"] <= frame["necessity"]).all()
    assert (frame["sufficiency"] <= frame["sufficiency_high"]).all()
    assert frame["head"].isna().sum() == 5
    row = frame[(frame["layer"] == 2) & (frame["head"] == 3)].iloc[0]
    assert row["necessity"] == pytest.approx(result.map()[2, 3])
    assert row["necessity_share"] == pytest.approx(row["necessity"] / result.total)
    panels = result.figure().data
    assert [panel.z.shape for panel in panels] == [(4, 5), (4, 5)]
    assert panels[0].z[2, 3] == pytest.approx(row["necessity"])
    assert panels[1].z[1, 4] == pytest.approx(
        frame.loc[(frame["unit"] == "mlp") & (frame["layer"] == 1), "sufficiency"].item()
    )
    assert len(result.blocks()) == 3
    loaded = Transplant.load(result.save(tmp_path / "result"))
    assert torch.equal(loaded.map().values, result.map().values)
    with pytest.raises(InputError, match="unit"):
        result.map(unit="qk")
    one = mc.transplant(model, twin, zoo.mixed(model, n=3)[0], units=["rest"]).to_frame()
    assert one["necessity_low"].isna().all()


def test_other_models_and_components_are_refused():
    model, twin = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)
    paragraphs = zoo.mixed(model, n=1)
    with pytest.raises(InputError, match="twin: tiny-gpt2 differs in"):
        mc.transplant(model, zoo.bridge("gpt2"), paragraphs)
    half = as_bridge(zoo.hf_model("gpt_neo").bfloat16(), zoo.tokenizer(), name="half")
    with pytest.raises(InputError, match="twin: half differs in"):
        mc.transplant(model, half, paragraphs)
    for names in ("L0H0", ["L9H0"], ["L0"], [3]):
        if names != ["L0"]:
            with pytest.raises(InputError, match="names"), transplanted(model, twin, names):
                pass
    with pytest.raises(InputError, match="units"):
        mc.transplant(model, twin, paragraphs, patched="activations", units=["qk"])


def test_models_of_one_shape_that_compute_otherwise_are_refused():
    """The base of the rotary embedding is no weight."""
    source = zoo.hf_model("llama", seed=1)
    config = copy.deepcopy(source.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10.0}
    other = type(source)(config).eval()
    other.load_state_dict(source.state_dict())
    other.set_attn_implementation("eager")
    twin = as_bridge(other, zoo.tokenizer(), name="other-base")
    model = zoo.bridge("llama")
    with pytest.raises(InputError, match="with all of its weights"):
        mc.transplant(model, twin, zoo.mixed(model, n=1))


def test_models_that_cannot_be_continued_are_refused(neo):
    adapter = adapt(neo)
    assert adapter.supports_partial_forward
    vars(adapter)["supports_partial_forward"] = False
    try:
        with pytest.raises(UnsupportedModel, match="transplants"):
            mc.transplant(neo, neo, zoo.mixed(neo, n=1))
    finally:
        vars(adapter)["supports_partial_forward"] = True
