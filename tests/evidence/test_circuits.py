"""Circuits: equal to plain PyTorch in float64, additive, and found where they were put."""

import itertools

import pytest
import torch

import memcircuits as mc
from memcircuits.display.pages import Page
from memcircuits.evidence.circuits.edge_attribution import attribute_edges
from memcircuits.evidence.circuits.edge_runs import EdgeRuns
from memcircuits.evidence.circuits.graph import Graph
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import double_bridge
from tests.helpers.oracle import Plain

N_PREFIX = 10
PARAGRAPH = mc.Paragraphs.from_tokens(zoo.random_ids(1, 22), n_prefix=N_PREFIX)
REFERENCE = mc.Paragraphs.from_tokens(zoo.random_ids(2, 22, seed=1), n_prefix=N_PREFIX)
PREFIX, CONTINUATION = slice(None, N_PREFIX - 1), slice(N_PREFIX - 1, None)
GRAPH = Graph(n_layers=3, n_heads=4)


@pytest.fixture(scope="module")
def runs():
    adapter = adapt(double_bridge("gpt2"))
    with adapter.preserving_state():
        yield EdgeRuns(adapter, PARAGRAPH, REFERENCE.ids)


@pytest.fixture(scope="module")
def plain():
    return Plain("gpt2", zoo.hf_model("gpt2").double())


def nll(logits):
    """NLL of the paragraph's continuation, nats/token."""
    log_prob = logits[:, N_PREFIX - 1 :].log_softmax(-1)
    true = PARAGRAPH.continuation[..., None].expand(len(logits), -1, -1)
    return -log_prob.gather(-1, true)[..., 0].mean(-1)


def node(name, positions):
    return 2 * GRAPH.names.index(name) + (positions == CONTINUATION)


def test_all_edges_are_the_paragraph_and_none_the_reference(runs, plain):
    with torch.no_grad():
        expected = nll(plain.logits(torch.cat([PARAGRAPH.ids, REFERENCE.ids])[:, :-1]))
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(runs.clean_and_reference_nll(), expected, **close)
    torch.testing.assert_close(runs.run(GRAPH.edges), expected[:1].expand(2), **close)
    torch.testing.assert_close(runs.run(torch.zeros_like(GRAPH.edges)), expected[1:], **close)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("L0H1", PREFIX), ("L1H2", CONTINUATION)),
        (("L0H1", CONTINUATION), ("L2H0", CONTINUATION)),
        (("L0H3", PREFIX), ("L1H0", PREFIX)),
        (("L1H3", CONTINUATION), ("L1.mlp", CONTINUATION)),
        (("L0H1", PREFIX), ("L1.mlp", PREFIX)),
        (("L2H1", CONTINUATION), ("logits", CONTINUATION)),
    ],
)
def test_path_patching_equals_plain_pytorch(runs, plain, source, target):
    """What one component reads changes; what it writes is put into a clean run by hand."""
    edges = GRAPH.edges.clone()
    edges[node(*source), node(*target)] = False
    with torch.no_grad():
        expected = patched_by_hand(plain, source, target, REFERENCE.ids[:1])
    torch.testing.assert_close(runs.run(edges)[:1], expected, atol=1e-10, rtol=0)
    assert float((expected - runs.clean_and_reference_nll()[0]).abs()) > 1e-6


def patched_by_hand(plain, source, target, reference):
    ids = torch.cat([PARAGRAPH.ids, reference])[:, :-1]
    layer, head = int(source[0][1]), int(source[0][3])
    z, w_o = plain.z(ids), plain.weights(lambda p: p.detach())["W_O"]
    outs = z[layer][:, :, head] @ w_o[layer][head]
    change = torch.zeros_like(outs[:1])
    change[:, source[1]] = (outs[1] - outs[0])[source[1]]
    if target[0] == "logits":
        norm = plain.model.transformer.ln_f
        hook = norm.register_forward_pre_hook(lambda _, args: (args[0] + change,))
    elif target[0].endswith("mlp"):
        hook = write_back(plain.blocks[int(target[0][1])].ln_2, change, target[1])
    else:
        hook = replace_z(plain, target, change, ids[:1])
    try:
        return nll(plain.logits(ids[:1]))
    finally:
        hook.remove()


def write_back(norm, change, positions):
    """The MLP behind a norm reads a changed stream, at some positions."""

    def hook(module, args, out):
        changed = out.clone()
        changed[:, positions] = module.forward(args[0] + change)[:, positions]
        return changed

    return norm.register_forward_hook(hook)


def replace_z(plain, target, change, ids):
    """The head's z on the changed stream takes the place of its clean one, at some positions."""
    layer, head = int(target[0][1]), int(target[0][3])
    block, out = plain.blocks[layer], plain.out[layer]
    kept = []
    hooks = [
        block.ln_1.register_forward_pre_hook(lambda _, args: (args[0] + change,)),
        out.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone())),
    ]
    plain.logits(ids)
    for hook in hooks:
        hook.remove()
    size = kept[0].shape[-1] // 4
    columns = slice(head * size, (head + 1) * size)

    def hook(_, args):
        z = args[0].clone()
        z[:, target[1], columns] = kept[0][:, target[1], columns]
        return (z,)

    return out.register_forward_pre_hook(hook)


def test_edges_of_a_head_sum_to_its_effect_by_plain_autograd(runs, plain):
    """To first order, at the middle between reference and paragraph: sums over all readers."""
    scores = attribute_edges(runs, steps=1)[0]
    ids = torch.cat([PARAGRAPH.ids, REFERENCE.ids[:1]])[:, :-1]
    z = plain.z(ids)
    kept = []
    hooks = [
        out.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for out in plain.out
    ]
    embedded = plain.model.transformer.wte(ids).detach()
    middle = embedded.mean(0, keepdim=True).requires_grad_()
    with torch.enable_grad():
        loss = nll(plain.model(inputs_embeds=middle, use_cache=False).logits).sum()
        gradients = torch.autograd.grad(loss, [*kept, middle])
    for hook in hooks:
        hook.remove()
    change = embedded[1] - embedded[0]
    for positions in (PREFIX, CONTINUATION):
        effect = (change * gradients[-1][0])[positions].sum()
        torch.testing.assert_close(
            scores[node("embed", positions)].nansum().double(), effect, atol=1e-6, rtol=1e-5
        )
    for layer, head in itertools.product(range(3), range(4)):
        gradient = gradients[layer].view(1, 21, 4, -1)[0, :, head]
        change = (z[layer][1] - z[layer][0])[:, head]
        for positions in (PREFIX, CONTINUATION):
            effect = (change * gradient)[positions].sum()
            total = scores[node(f"L{layer}H{head}", positions)].nansum().double()
            torch.testing.assert_close(total, effect, atol=1e-6, rtol=1e-5)


def chain():
    """A GPT-2 with two heads: L0H1 writes into dimensions that L1H2 alone reads."""
    model = zoo.hf_model("gpt2")
    blocks = model.transformer.h
    with torch.no_grad():
        for block in blocks:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        channel = slice(0, 8)
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight[:, channel] = 0
            embedding.weight[:, 8:] -= embedding.weight[:, 8:].mean(-1, keepdim=True)
        generator = torch.Generator().manual_seed(3)
        first, second = blocks[0].attn, blocks[1].attn
        # Values are columns 64 to 95; head h has the h-th 8 of them. Attention is uniform.
        first.c_attn.weight[8:, 72:80] = torch.randn(24, 8, generator=generator)
        first.c_proj.weight[8:16, channel] = torch.randn(8, 8, generator=generator)
        second.c_attn.weight[channel, 80:88] = torch.randn(8, 8, generator=generator)
        model.transformer.ln_f.weight *= 100
        second.c_proj.weight[16:24, 8:] = 3 * torch.randn(8, 24, generator=generator)
    return as_bridge(model, zoo.tokenizer(), name="chain")


@pytest.fixture(scope="module")
def circuit():
    model = chain()
    paragraph = zoo.reciting(model, n=1, n_prefix=N_PREFIX, n_continuation=12)
    references = mc.Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=1), n_prefix=N_PREFIX)
    return mc.recitation_circuit(
        model, paragraph, reference=references, draws=3, verify=6, progress=False
    )


def test_a_planted_chain_of_two_heads_is_found(circuit):
    frame = circuit.to_frame()
    heads = frame[frame["source"].str.contains("H") & frame["target"].str.contains("H")]
    assert set(heads["source"] + heads["target"]) == {"L0H1L1H2"}
    assert circuit.kept[node("L0H1", PREFIX), node("L1H2", CONTINUATION)]
    assert set(frame["source"]) | set(frame["target"]) <= {"embed", "L0H1", "L1H2", "logits"}
    assert circuit.faithfulness >= 0.8


def test_what_is_not_connected_has_no_effect(circuit):
    scores = circuit.scores.nan_to_num()
    chained = {"embed", "L0H1", "L1H2", "logits"}
    for i, name in enumerate(circuit.components):
        if name not in chained:
            assert (scores[:, 2 * i : 2 * i + 2] == 0).all()
            assert (scores[:, :, 2 * i : 2 * i + 2] == 0).all()


def test_a_circuit_has_its_size_and_only_edges_on_paths():
    graph = Graph(n_layers=2, n_heads=1)
    order = graph.edges.nonzero()
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    for size in (1, 5, 12, len(order)):
        circuit = graph.circuit(order, size)
        assert int(circuit.sum()) >= size
        pairs = {tuple(edge) for edge in circuit.nonzero().tolist()}
        on_paths = set()
        nodes = range(len(circuit))
        for length in range(1, 6):  # at most from the embedding through two heads and MLPs
            for between in itertools.combinations(nodes[2:-1], length - 1):
                for start in (0, 1):
                    path = (start, *between, nodes[-1])
                    steps = set(itertools.pairwise(path))
                    on_paths |= steps if steps <= pairs else set()
        assert pairs == on_paths
    assert torch.equal(circuit, graph.edges)


def test_the_page_shows_the_circuit_and_escapes_names(circuit, tmp_path):
    named = mc.recitation_circuit(
        chain(),
        mc.Paragraphs(PARAGRAPH.ids, N_PREFIX, ["<script>alert(1)</script>"]),
        reference=REFERENCE,
        steps=1,
        verify=0,
        faithfulness=0.01,
        progress=False,
    )
    page = Page("Circuit", named.blocks(), str(named)).render()
    assert "<script>alert(1)" not in page
    assert page.count('class="edge c') == named.n_edges
    loaded = type(circuit).load(circuit.save(tmp_path / "circuit.safetensors"))
    assert loaded.to_frame().equals(circuit.to_frame())
    assert len(circuit.figure().data) >= 2


def test_bad_input_is_refused():
    model = zoo.bridge("gpt2")
    with pytest.raises(mc.InputError, match="give one"):
        mc.recitation_circuit(model, REFERENCE, progress=False)
    longer = mc.Paragraphs.from_tokens(zoo.random_ids(1, 30), n_prefix=N_PREFIX)
    with pytest.raises(mc.InputError, match="same length"):
        mc.recitation_circuit(model, PARAGRAPH, reference=longer, progress=False)
    with pytest.raises(mc.InputError, match="less likely"):
        mc.recitation_circuit(model, PARAGRAPH, reference=PARAGRAPH, progress=False)
    for option in ({"draws": 0}, {"faithfulness": 0}, {"steps": 0}, {"verify": -1}):
        with pytest.raises(mc.InputError, match=next(iter(option))):
            mc.recitation_circuit(model, PARAGRAPH, progress=False, **option)
