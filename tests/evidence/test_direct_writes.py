"""What components write: equal to plain PyTorch, additive, and found where it was put."""

import pytest
import torch

import memcircuits as mc
from memcircuits.base.components import Component
from memcircuits.base.errors import UnsupportedModel
from memcircuits.evidence.direct_writes import writes
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import double_bridge
from tests.helpers.oracle import Plain

PARAGRAPHS = mc.Paragraphs.from_tokens(zoo.random_ids(3, 22), n_prefix=10)


def test_names_of_components():
    for name, component in {
        "L3H5": Component("head", 3, 5),
        "L2.mlp": Component("mlp", 2),
        "L1N17": Component("neuron", 1, neuron=17),
        "L4": Component("layer", 4),
    }.items():
        assert Component.of(name) == component
        assert str(component) == name
    assert Component.of((3, 5)) == Component.of(mc.Head(3, 5)) == Component("head", 3, 5)
    for wrong in ("H5", "L3H5.ov", "L3.x", 7):
        with pytest.raises(mc.InputError, match="write it like"):
            Component.of(wrong)


def test_heads_and_neurons_equal_plain_pytorch():
    """In float64, on GPT-2: the final norm's scale, weight and the unembedding by hand."""
    plain = Plain("gpt2", zoo.hf_model("gpt2").double())
    ids = PARAGRAPHS.ids[:, :-1]
    z, hidden, act = plain.z(ids), [], []
    norm, mlp = plain.model.transformer.ln_f, plain.blocks[1].mlp
    norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    mlp.c_proj.register_forward_pre_hook(lambda _, args: act.append(args[0]))
    with torch.no_grad():
        plain.logits(ids)
        w_o = plain.weights(lambda p: p.detach())["W_O"]
        outs = [z[2][:, :, 1] @ w_o[2][1], act[0][..., [5]] * mlp.c_proj.weight[5]]
        scale = (hidden[0].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        expected = []
        for out in outs:
            logits = ((out - out.mean(-1, keepdim=True)) / scale * norm.weight) @ (
                plain.model.lm_head.weight.T
            )
            expected.append((logits - logits.mean(-1, keepdim=True))[:, 9:])
    result = writes(double_bridge("gpt2"), PARAGRAPHS, ["L2H1", "L1N5"], progress=False)
    for i, logits in enumerate(expected):
        true = logits.gather(-1, PARAGRAPHS.continuation[..., None])[..., 0]
        torch.testing.assert_close(result.contribution[i], true, atol=1e-9, rtol=1e-9)
        best = logits.mean((0, 1)).topk(5)
        assert torch.equal(result.promoted[i], best.indices)
        torch.testing.assert_close(result.promotion[i], best.values, atol=1e-9, rtol=1e-9)
    attention = plain.attention(ids)[:, 2, 1, 9:]
    assert torch.equal(result.attended[0], attention.argmax(-1))
    assert (result.attended[1] == -2).all()


@pytest.mark.parametrize("name", ["gpt_neo", "neox", "opt", "llama", "qwen3"])
def test_the_neurons_of_a_layer_add_what_its_mlp_adds(name):
    """Up to the bias of the MLP, which is the same at every place but for the norm's scale."""
    model = zoo.bridge(name)
    n_neurons = adapt(model).weight(1, "W_out").values.shape[1]
    names = ["L1.mlp", *(f"L1N{i}" for i in range(n_neurons))]
    contribution = writes(model, PARAGRAPHS, names, progress=False).contribution
    # Fresh models have biases of zero.
    torch.testing.assert_close(contribution[1:].sum(0), contribution[0], atol=1e-4, rtol=1e-4)
    assert contribution[0].abs().max() > 0.01


def test_the_frame_names_what_is_written_and_read(neo):
    result = writes(neo, PARAGRAPHS, ["L3H1", "L2.mlp"], k=3, progress=False)
    frame = result.to_frame()
    assert frame["rank"].tolist() == [1, 2, 3] * 2
    first = frame.iloc[0]
    row, pos = PARAGRAPHS.names.index(first["id"]), first["pos"]
    assert first["logit"] == pytest.approx(float(result.contribution[0].max()))
    assert first["writes"] == f"<{int(PARAGRAPHS.continuation[row, pos])}>"
    read = int(result.attended[0, row, pos])
    assert first["reads"] == f"<{int(PARAGRAPHS.ids[row, read])}>"
    assert (frame["reads"][3:] == "").all()
    assert len(result.blocks()[0].frame) == 6


def test_what_a_planted_head_writes(neo):
    """A head whose output is a multiple of one token's direction promotes that token."""
    source = zoo.hf_model("gpt_neo")
    token, out = 42, source.transformer.h[3].attn.attention.out_proj.weight
    with torch.no_grad():
        direction = source.lm_head.weight[token] / source.lm_head.weight[token].norm()
        v = source.transformer.h[3].attn.attention.v_proj.weight
        v[8:16] = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).abs()
        out[:, 8:16] = 0.1 * direction[:, None]
        source.transformer.h[3].ln_1.weight.fill_(0)
        source.transformer.h[3].ln_1.bias.fill_(1)
    model = as_bridge(source, zoo.tokenizer(), name="tiny-writer")
    result = writes(model, PARAGRAPHS, ["L3H1"], progress=False)
    assert result.promoted[0, 0] == token
    assert result.promotion[0, 0] > 0


@pytest.mark.parametrize(
    ("components", "says"),
    [
        ([], "at least one"),
        (["L9H0"], "4 layers"),
        (["L0H9"], "heads"),
        (["L0N999"], "neurons"),
        (["L0"], "heads, MLPs and neurons"),
        ("L0H1", "give a list"),
    ],
)
def test_bad_components(neo, components, says):
    with pytest.raises(mc.InputError, match=says):
        writes(neo, PARAGRAPHS, components)


def test_blocks_that_are_no_sums_are_refused():
    with pytest.raises(UnsupportedModel):
        writes(zoo.bridge("gemma2"), PARAGRAPHS, ["L0H0"])
