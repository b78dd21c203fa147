"""Neurons, what drives them and what they write: sums, plain PyTorch, and a neuron made by hand."""

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.lookups.driving import NeuronInputs
from memcircuits.evidence.lookups.writing import LogitWriting
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import double_bridge
from tests.helpers.oracle import Plain

PARAGRAPHS = Paragraphs.from_tokens(zoo.random_ids(6, 22), n_prefix=10)
ROWS, POS = torch.tensor([0, 1, 4]), torch.tensor([3, 20, 11])
NEURONS = torch.tensor([5, 60, 17])


def parts_in(adapter, layer):
    """The residual stream of the three prompts, taken apart, and the reader of the layer."""
    inputs = NeuronInputs(adapter, layer)
    cache = run_to_continuation(adapter, PARAGRAPHS, read=inputs.reads).cache
    return inputs, inputs.parts(cache, ROWS, POS)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "neox", "opt", "llama", "qwen3"])
def test_heads_mlps_embedding_and_biases_add_up_to_the_pre_activation(name):
    """In float64; pre-activations are read from the transformers model by a plain hook."""
    source = zoo.shaken(zoo.hf_model(name)).double()
    layer = source.config.num_hidden_layers - 1
    plain = Plain(name, zoo.shaken(zoo.hf_model(name)).double())
    place = {"gpt_neo": "mlp.c_fc", "gpt2": "mlp.c_fc", "neox": "mlp.dense_h_to_4h", "opt": "fc1"}
    read_in = plain.blocks[layer].get_submodule(place.get(name, "mlp.gate_proj"))
    pre = []
    handle = read_in.register_forward_hook(lambda _, args, out: pre.append(out))
    with torch.no_grad():
        plain.logits(PARAGRAPHS.ids[:, :-1])
    handle.remove()
    expected = pre[0].view(6, 21, -1)[ROWS, POS, NEURONS]
    adapter = adapt(model := as_bridge(source, zoo.tokenizer(), name=f"tiny-{name}"))
    with adapter.preserving_state():
        inputs, parts = parts_in(adapter, layer)
        pieces = (parts.heads, parts.mlps, parts.embedding, parts.biases)
        attributed = [inputs.attribution(p, parts.total, NEURONS) for p in pieces]
        total = sum(a.reshape(3, -1).sum(1) for a in attributed)
        # What remains are the biases of the norm and of the neurons, which read no part.
        weight = inputs._weight.T[NEURONS]
        total = total + weight @ inputs._norm.bias
        if read_in.bias is not None:
            total = total + read_in.bias[NEURONS]
    assert model.cfg.n_layers == layer + 1
    # RMSNorm and the angles of rotary positions are computed in float32.
    tolerance = 1e-9 if name in ("gpt_neo", "gpt2", "opt") else 1e-5
    torch.testing.assert_close(total, expected, atol=tolerance, rtol=tolerance)
    assert attributed[0].abs().max() > 1e-3
    spread = parts.biases - parts.biases.mean(0)
    assert spread.abs().max() < 1e-12  # the same at every prompt: no head or MLP is missing


@pytest.mark.parametrize("name", ["gpt_neo", "llama", "neox"])
def test_the_drop_equals_a_plain_hook_on_the_input_of_the_mlp(name):
    """A head's output is taken out of what the norm before the MLP reads, by transformers alone."""
    model, plain = zoo.bridge(name), Plain(name, zoo.hf_model(name))
    result = mc.lookups(model, PARAGRAPHS, neurons=2, prompts=2)
    layer, index = result.neurons[-1].tolist()
    row, pos = result.prompts[-1, 0].tolist()
    norm = plain.blocks[layer].get_submodule(
        {"gpt_neo": "ln_2"}.get(name, "post_attention_layernorm")
    )
    mlp = plain.blocks[layer].mlp
    out = {"gpt_neo": "c_proj", "neox": "dense_4h_to_h"}.get(name, "down_proj")
    w_o = plain.weights(lambda p: p.detach())["W_O"]
    z = plain.z(PARAGRAPHS.ids[:, :-1])
    read = []
    handle = mlp.get_submodule(out).register_forward_pre_hook(
        lambda _, args: read.append(args[0].view(6, 21, -1)[row, pos, index])
    )
    with torch.no_grad():
        plain.logits(PARAGRAPHS.ids[:, :-1])
        heads = [(i, h) for i in range(layer + (name != "neox")) for h in range(4)]
        for i, h in heads:
            write = z[i][:, :, h] @ w_o[i][h]
            change = norm.register_forward_pre_hook(lambda _, args, w=write: (args[0] - w,))
            plain.logits(PARAGRAPHS.ids[:, :-1])
            change.remove()
    handle.remove()
    whole, *without = read
    torch.testing.assert_close(result.activation[-1, 0], whole, atol=1e-5, rtol=0)
    drop = result.drop[-1, 0]
    for (i, h), activation in zip(heads, without, strict=True):
        torch.testing.assert_close(drop[i, h], whole - activation, atol=2e-5, rtol=0)
    assert drop.isfinite().sum() == len(heads)
    assert drop[drop.isfinite()].abs().max() > 1e-3


def test_contributions_of_all_neurons_are_what_mlps_add_to_the_logits():
    """In float64: one scale for all, so removing every MLP's output moves the logits by the sum."""
    adapter = adapt(double_bridge("gpt2"))
    with adapter.preserving_state():
        writing = LogitWriting(adapter)
        by_neuron = writing.contributions(PARAGRAPHS, slice(0, 3)).sum((2, 3))
        names = [f"blocks.{i}.hook_mlp_out" for i in range(adapter.n_layers)]
        final = f"blocks.{adapter.n_layers - 1}.hook_resid_post"
        cache = run_to_continuation(adapter, PARAGRAPHS, slice(0, 3), read=[*names, final]).cache
        mlps = sum(cache[name] for name in names)[:, -12:]
        mlps = mlps - sum(adapter.model.blocks[i].mlp.out.bias for i in range(adapter.n_layers))
        whole = cache[final][:, -12:]
        scale = (whole.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        norm = adapter.model.ln_final.original_component
        logits = (mlps - mlps.mean(-1, keepdim=True)) / scale * norm.weight @ adapter.model.W_U
        logits = logits - logits.mean(-1, keepdim=True)
        expected = logits.gather(-1, PARAGRAPHS.continuation[:3, :, None])[..., 0]
    torch.testing.assert_close(by_neuron, expected, atol=1e-9, rtol=1e-7)


def test_what_was_written_into_a_neuron_ranks_first():
    """Neuron 7 of layer 2 writes token 42, and reads what one head writes."""
    source = zoo.hf_model("gpt2")
    bridge = as_bridge(zoo.hf_model("gpt2"), zoo.tokenizer(), name="tiny-gpt2")
    adapter = adapt(bridge)
    with adapter.preserving_state(), torch.no_grad():
        inputs = NeuronInputs(adapter, 2)
        cache = run_to_continuation(adapter, PARAGRAPHS, read=inputs.reads).cache
        rows, pos = torch.arange(6).repeat_interleave(20), torch.arange(1, 21).repeat(6)
        writes = inputs.parts(cache, rows, pos).heads.mean(0)
        head = int(writes.norm(dim=-1).argmax())
        block = source.transformer.h[2]
        block.mlp.c_fc.weight[:, 7] = writes[head] / writes[head].norm()
        block.mlp.c_fc.bias[7] = 1.0
        block.mlp.c_proj.weight[7] = 5 * source.transformer.wte.weight[42]
    changed = as_bridge(source, zoo.tokenizer(), name="tiny-gpt2")
    result = mc.lookups(changed, PARAGRAPHS, neurons=3, prompts=6)
    frame = result.to_frame()
    first = frame[(frame["layer"] == 2) & (frame["kind"] == "next-token")].iloc[0]
    assert (first["neuron"], first["token"].strip()) == (7, "<42>")
    assert first["head"] == str(mc.Head(*divmod(head, 4)))
    at = int((result.neurons == torch.tensor([2, 7])).all(1).nonzero()[0])
    by_drop = result.drop[at].mean(0).nan_to_num(-torch.inf)
    assert int(by_drop.argmax()) == head


def test_auc_and_ks_by_hand(neo):
    """Heads active in one half drop the neuron in the other, or no head does."""
    result = mc.lookups(neo, PARAGRAPHS, neurons=2, prompts=4)
    scores = []
    for n in range(len(result.neurons)):
        for half in (0, 1):
            rate = result.active[n, half::2].float().mean(0).flatten()
            drop = result.relative_drop[n, 1 - half :: 2].mean(0).flatten()
            known = drop.isfinite()
            rate, drop = rate[known], drop[known]
            called, others = drop[rate >= 0.25].tolist(), drop[rate < 0.25].tolist()
            pairs = [(a > b) + 0.5 * (a == b) for a in called for b in others]
            scores.append(sum(pairs) / len(pairs))
    expected = torch.tensor(scores).view(-1, 2).mean(1)
    torch.testing.assert_close(result.auc, expected)
    assert (result.active.flatten(2).sum(-1) == 3).all()
    summary = result.summary(draws=50).set_index("neurons")
    assert summary.loc["next-token", "n"] == 4
    assert summary.loc["difference", "auc"] == pytest.approx(
        float(expected[:4].mean() - expected[4:].mean())
    )
    assert 0 < result.ks[0] <= 1


def test_prompts_are_the_peaks(neo):
    result = mc.lookups(neo, PARAGRAPHS, neurons=2, prompts=3)
    layer, index = result.neurons[0].tolist()
    name = f"blocks.{layer}.mlp.hook_post"
    with torch.no_grad():
        _, cache = neo.run_with_cache(
            PARAGRAPHS.ids[:, :-1], prepend_bos=False, names_filter=[name]
        )
    peaks = cache[name][:, 1:, index].max(1)
    torch.testing.assert_close(result.activation[0], peaks.values.topk(3).values)
    assert result.prompts[0, :, 0].tolist() == peaks.values.topk(3).indices.tolist()
    assert (result.prompts[0, :, 1] == peaks.indices[result.prompts[0, :, 0]] + 1).all()


def test_writers_of_a_token_are_those_of_the_largest_contribution(neo):
    result = mc.lookups(neo, PARAGRAPHS, neurons=2, prompts=2)
    adapter = adapt(neo)
    with adapter.preserving_state():
        expected = LogitWriting(adapter).contributions(PARAGRAPHS, slice(0, 6))
    torch.testing.assert_close(result.contribution[..., 0], expected.flatten(2).amax(-1))
    layer, neuron = result.writers[2, 5, 0].tolist()
    assert expected[2, 5, layer, neuron] == expected[2, 5].max()
    assert len(result.writers_frame()) == 6 * 12 * 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"neurons": 0}, "neurons: 0; give an integer of at least 1"),
        ({"neurons": 65}, "neurons: 65; a layer has 128: give at most 64"),
        ({"prompts": 1}, "prompts"),
        ({"max_paragraphs": 1}, "max_paragraphs"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options(neo, options, says):
    with pytest.raises(mc.InputError, match=says):
        mc.lookups(neo, PARAGRAPHS, **options)


def test_one_paragraph_is_not_enough(neo):
    with pytest.raises(mc.InputError, match="paragraphs: 1 usable; give at least two"):
        mc.lookups(neo, PARAGRAPHS[:1])


def test_blocks_that_norm_what_they_write_are_refused():
    with pytest.raises(UnsupportedModel, match="norm what heads or neurons have written"):
        mc.lookups(zoo.bridge("gemma2"), PARAGRAPHS)
