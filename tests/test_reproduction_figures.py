"""Each figure of the reproduction against plain transformers and PyTorch, on a tiny model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.nn.functional import cosine_similarity

import memcircuits as mc
from tests.helpers import models as zoo

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from reproduction import (
    activations,
    attention,
    beyond,
    contents,
    experiments,
    patching,
    similarity,
    tuning,
    weights,
)
from reproduction.filters import Filters
from reproduction.pairs import found_pairs, given_pairs
from reproduction.study import EXPERIMENTS, Study

PREFIX, TOKENS, HEADS = 10, 12, 4  # of a paragraph, and of the model


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Six paragraphs that a tiny model recites, and fifteen others; exact patching."""
    model = zoo.bridge("gpt_neo")
    recited = zoo.reciting(model, n=6, n_prefix=PREFIX, n_continuation=TOKENS)
    others = mc.Paragraphs.from_tokens(zoo.random_ids(15, PREFIX + TOKENS, seed=3), n_prefix=PREFIX)
    return Study(
        model=model,
        given=recited,
        controls=others,
        perturbed_given=None,
        filters=Filters(0.0),
        n_dropped=0,
        unigrams=None,
        as_given=True,
        limit=6,
        edits=2,
        patching="exact",
        seed=0,
        memory_budget=None,
        folder=tmp_path_factory.mktemp("study"),
    )


@pytest.fixture
def plain():
    """The same weights in transformers alone."""
    return zoo.hf_model("gpt_neo")


def modules(plain, name):
    """The modules of one kind, layer by layer."""
    for block in plain.transformer.h:
        attn = block.attn.attention
        yield {
            "W_Q": attn.q_proj,
            "W_K": attn.k_proj,
            "W_V": attn.v_proj,
            "W_O": attn.out_proj,
            "W_in": block.mlp.c_fc,
            "W_out": block.mlp.c_proj,
            "mlp": block.mlp,
            "attn": attn,
        }[name]


def nll(plain, ids):
    """-log p of each continuation token, [paragraph, token]."""
    log_p = plain(ids[:, :-1]).logits[:, PREFIX - 1 :].log_softmax(-1)
    return -log_p.gather(-1, ids[:, PREFIX:, None])[..., 0]


def by_head(gradient, component):
    """Largest |gradient| of each head from a stored matrix, [out, in]."""
    rows = gradient if component != "W_O" else gradient.T
    return rows.abs().reshape(HEADS, -1).amax(-1)


def expected_map(plain, component):
    grads = [module.weight.grad for module in modules(plain, component)]
    if component in ("W_in", "W_out"):
        return torch.stack([grad.abs().max()[None] for grad in grads])
    return torch.stack([by_head(grad, component) for grad in grads])


def assert_close(ours, expected, rtol=2e-3):
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(expected), rtol=rtol, atol=1e-5, check_dtype=False
    )


# -- gradients of weights -------------------------------------------------------------------------


def test_map_of_parameter_gradients(study, plain):
    """Figure 4: the whole matrix of the chart, and the sum and share of the rows."""
    nll(plain, study.memorized.ids).mean().backward()
    outcome = weights.gradients(study)
    chart = next(s for _, s in outcome.charts if s["title"].endswith("component, EM 50"))
    expected = torch.cat([expected_map(plain, c) for c in study.adapter.components], 1)
    assert chart["col_names"][:2] == ["W_Q 0", "W_Q 1"]
    assert_close(chart["values"], expected)
    numbers = {f.measure: f.ours for f in outcome.findings}
    assert numbers["sum of the largest |gradient|, EM 50"] == pytest.approx(
        float(expected.sum()), rel=1e-3
    )
    share = 100 * expected[:2].sum() / expected.sum()
    assert numbers["share of the lower half of layers, EM 50"] == pytest.approx(
        float(share), rel=1e-3
    )


def test_statistics_of_gradients(study, plain):
    """Figure 9: bars by component over all layers, and the sums of attention and MLP by layer."""
    nll(plain, study.memorized.ids).mean().backward()
    charts = weights.gradient_statistics(study).charts
    bars = {s["title"]: [p for p in s["frame"] if p["EM"] == "EM 50"] for _, s in charts}
    for component in ("W_K", "W_out"):
        g = torch.stack([module.weight.grad for module in modules(plain, component)])
        values = {
            t: p["value"] for t, b in bars.items() for p in b if p.get("component") == component
        }
        assert_close(values["Sum of |g|"], g.abs().sum())
        assert_close(values["Variance of g"] * 1e6, g.var(correction=0) * 1e6)
        assert_close(values["Largest g"], g.max())
        assert_close(values["Smallest g, without its sign"], -g.min())
    layers = [p["sum"] for p in bars["Sum of |g| by layer, MLP"]]
    sums = [
        sum(next(m for i, m in enumerate(modules(plain, c)) if i == layer).weight.grad.abs().sum()
            for c in ("W_in", "W_out"))
        for layer in range(4)
    ]  # fmt: skip
    assert_close(layers, torch.stack(sums))


def test_maps_of_the_contrastive_objectives(study, plain):
    """Both are means over paragraphs of each one's own largest gradients."""
    charts = [settings for _, settings in weights.contrast(study).charts]
    for chart, paragraphs in zip(charts, (study.memorized, study.pairs.corrupted), strict=True):
        expected = []
        for ids in paragraphs.ids.split(1):
            plain.zero_grad()
            nll(plain, ids).mean().backward()
            expected.append(expected_map(plain, "W_V"))
        names = chart["col_names"]
        columns = [names.index(f"W_V {head}") for head in range(HEADS)]
        assert_close(torch.tensor(chart["values"])[:, columns], torch.stack(expected).mean(0))


# -- gradients of activations ---------------------------------------------------------------------


def gradient_of_values(plain, ids, loss):
    """|dL/dv|, the gradient itself, [layer, pos, head, d_head]."""
    kept = []

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    handles = [module.register_forward_hook(keep) for module in modules(plain, "W_V")]
    loss(nll(plain, ids)[0]).backward()
    for handle in handles:
        handle.remove()
    return torch.stack([v.grad[0].unflatten(-1, (HEADS, -1)) for v in kept])


def test_activation_gradients_over_the_continuation(study, plain):
    each = [
        gradient_of_values(plain, ids, torch.mean)[:, PREFIX - 1 :].abs().amax(-1).mean(1)
        for ids in study.memorized.ids.split(1)
    ]
    assert_close(
        activations.continuation_map(study, study.memorized)["v"], torch.stack(each).mean(0)
    )


@pytest.mark.parametrize("text", ["memorized", "perturbed"])
def test_activation_gradients_at_the_two_tokens(study, plain, text):
    """The 2 x 2: each text's own NLL of the first impacted token."""
    clean, corrupted = study.pairs
    paragraphs = clean if text == "memorized" else corrupted
    ours = activations.at_two_places(study, paragraphs, corrupted)
    for i, ids in enumerate(paragraphs.ids.split(1)):
        position, token = (corrupted.metadata[k][i] for k in ("position", "first_impacted"))
        assert corrupted.ids[i, position] != clean.ids[i, position]
        grads = gradient_of_values(plain, ids, lambda loss, t=token: loss[t]).abs().amax(-1)
        assert_close(ours["perturbed token"]["v"][i], grads[:, position])
        assert_close(ours["first impacted token"]["v"][i], grads[:, PREFIX - 1 + token])


def test_map_of_tokens(study, plain):
    _, chart = activations.token_map(study)
    grads = gradient_of_values(plain, study.memorized.ids[:1], torch.mean).abs().amax(-1)
    head = int(grads.amax((0, 1)).argmax())
    assert f"head {head} " in chart["title"]
    assert_close(chart["values"], grads[:, :, head])
    assert len(chart["col_names"]) == PREFIX + TOKENS - 1


# -- patching -------------------------------------------------------------------------------------


def patched_nll(plain, base, source, kind, layer, position, head=None):
    """NLL of `base` with the output of one module at a position taken from the run of `source`."""
    module = list(modules(plain, kind))[layer]
    kept = {}

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    handle = module.register_forward_hook(lambda _, __, out: kept.update(v=first(out).clone()))
    with torch.no_grad():
        nll(plain, source)
    handle.remove()
    d_head = kept["v"].shape[-1] // HEADS
    part = slice(None) if head is None else slice(head * d_head, (head + 1) * d_head)

    def write(_, __, out):
        first(out)[:, position, part] = kept["v"][:, position, part]
        return out

    handle = module.register_forward_hook(write)
    with torch.no_grad():
        result = nll(plain, base)[0]
    handle.remove()
    return result


DIRECTIONS = list(patching.DIRECTIONS)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_patching_in_each_direction(study, plain, direction):
    """The second direction measures the perturbed text's own first impacted token."""
    clean, corrupted = study.pairs
    ours = patching.patched(study, direction)["v"].samples["first_impacted"]
    for i in range(2):
        position, token = (corrupted.metadata[k][i] for k in ("position", "first_impacted"))
        memorized, perturbed = clean.ids[i : i + 1], corrupted.ids[i : i + 1]
        mixed = torch.cat([perturbed[:, :PREFIX], memorized[:, PREFIX:]], 1)
        base, source = {
            DIRECTIONS[0]: (memorized, perturbed),
            DIRECTIONS[1]: (perturbed, memorized),
            DIRECTIONS[2]: (mixed, memorized),
        }[direction]
        with torch.no_grad():
            before = nll(plain, base)[0, token]
        for layer, head in ((0, 1), (2, 3)):
            after = patched_nll(plain, base, source, "W_V", layer, position, head)[token]
            assert_close(ours[i, layer, head], after - before)


@pytest.mark.parametrize(("site", "kind"), [("mlp_out", "mlp"), ("attn_out", "attn")])
def test_outputs_of_layers_at_the_perturbed_token(study, plain, site, kind):
    clean, corrupted = study.pairs
    position, token = (corrupted.metadata[k][0] for k in ("position", "first_impacted"))
    memorized, perturbed = clean.ids[:1], corrupted.ids[:1]
    with torch.no_grad():
        before = nll(plain, memorized)[0, token]
    after = [
        patched_nll(plain, memorized, perturbed, kind, layer, position)[token] for layer in range(4)
    ]
    assert_close(patching.layer_outputs(study, site)[0], torch.stack(after) - before)


def test_heads_by_position(study, plain):
    clean, corrupted = (group[patching.FEW] for group in study.pairs)
    ours = patching.head_by_position(study)
    first = min(corrupted.metadata["position"])
    assert not ours[..., :first].any()
    position, head, layer = PREFIX - 1, 2, 1
    effects = []
    for i, token in enumerate(corrupted.metadata["first_impacted"]):
        memorized = clean.ids[i : i + 1]
        mixed = torch.cat([corrupted.ids[i : i + 1, :PREFIX], memorized[:, PREFIX:]], 1)
        with torch.no_grad():
            before = nll(plain, memorized)[0, token]
        after = patched_nll(plain, memorized, mixed, "W_Q", layer, position, head)[token]
        effects.append(after - before)
    assert_close(ours[layer, head, position], torch.stack(effects).mean())


# -- attention ------------------------------------------------------------------------------------


def test_kendall_over_token_types():
    prefixes = torch.tensor([[1, 2, 3], [2, 2, 4]])
    weight = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    corpus = torch.tensor([[1, 2, 3, 2], [2, 4, 4, 9]])
    # Attention summed per type: 1: 0.5, 2: 0.3 + 0.1 + 0.2 = 0.6, 3: 0.2, 4: 0.7.
    # Occurrences in the corpus: 1: 1, 2: 3, 3: 1, 4: 2.
    expected = stats.kendalltau([1, 3, 1, 2], [0.5, 0.6, 0.2, 0.7]).statistic
    ours = attention.kendall_by_type(weight[:, None, None], prefixes, corpus)
    assert float(ours) == pytest.approx(expected)
    only = attention.kendall_by_type(weight[:, None, None], prefixes, corpus[1:])
    assert float(only) == pytest.approx(stats.kendalltau([1, 2], [0.6, 0.7]).statistic)


def test_maps_of_attention(study, plain):
    """Entropy of every head and the coloured example, from transformers' own patterns."""
    ids = (study.memorized + study.control).ids
    with torch.no_grad():
        patterns = plain(ids[:, : PREFIX + 1], output_attentions=True).attentions
    seen = torch.stack([p[:, :, -1, :PREFIX] for p in patterns], 1)
    share = seen / seen.sum(-1, keepdim=True)
    charts = {s["title"]: s for _, s in attention.rare_tokens(study).charts}
    entropy = torch.from_numpy(stats.entropy(share.numpy(), axis=-1)).mean(0)
    assert_close(charts["Entropy of the attention to the prefix"]["values"], entropy)
    title = next(title for title in charts if "from the first decoded token" in title)
    head = mc.Head.parse(title.split()[2])
    assert_close(charts[title]["values"], seen[0, head.layer, head.head])


# -- similarity and description -------------------------------------------------------------------


def test_cosine_maps(study, plain):
    clean, corrupted = study.pairs
    kept = []
    handles = [
        module.register_forward_hook(lambda _, __, out: kept.append(out[:, PREFIX - 1].mean(0)))
        for module in modules(plain, "W_Q")
    ]
    with torch.no_grad():
        for group in (clean, corrupted):
            plain(group.ids[:, :PREFIX])
    for handle in handles:
        handle.remove()
    q = torch.stack(kept).unflatten(-1, (HEADS, -1)).unflatten(0, (2, 4))
    ours = similarity.cosine_of_activations(study.adapter, clean, corrupted, ("q",))["q"]
    assert_close(ours, cosine_similarity(q[0], q[1], dim=-1))
    each = [
        gradient_of_values(plain, ids, torch.mean)[:, PREFIX - 1 :].mean(1)
        for ids in clean.ids.split(1)
    ]
    assert_close(
        similarity.mean_gradient_of_values(study.adapter, clean), torch.stack(each).mean(0)
    )


def test_two_largest_logits(study, plain):
    with torch.no_grad():
        logits = plain(study.memorized.ids[:, :-1]).logits.sort(-1, descending=True).values
    assert_close(beyond.top_two(study, study.memorized), logits[..., :2].mean(0).T)


def test_noise_on_one_head(study, plain):
    """The same noise, written into the largest gradients of the matrix by hand."""
    head, points = beyond.noise_on_one_head(study)
    nll(plain, study.memorized.ids).mean().backward()
    weight = list(modules(plain, "W_V"))[head.layer].weight

    def of_head(matrix):  # [d_in, d_head], as a view
        return matrix.unflatten(0, (HEADS, -1))[head.head].T

    for n in beyond.ONE_HEAD_WEIGHTS:
        original = weight.detach().clone()
        largest = of_head(weight.grad).abs().flatten().topk(n).indices.sort().values
        noise = torch.randn(1, n, generator=torch.Generator().manual_seed(0))[0]
        row, column = largest // of_head(original).shape[1], largest % of_head(original).shape[1]
        size = beyond.ONE_HEAD_SIZE * original.square().mean().sqrt()
        of_head(weight.data)[row, column] += size * noise
        with torch.no_grad():
            greedy = plain(study.memorized.ids[:, :-1]).logits[:, PREFIX - 1 :].argmax(-1)
        same = greedy == study.memorized.continuation
        expected = same.long().cumprod(1).sum(1).float().mean()
        weight.data.copy_(original)
        (em,) = (p["em"] for p in points if (p["set"], p["weights"]) == ("memorized", n))
        assert em == pytest.approx(float(expected))
    assert [p["em"] for p in points if p["weights"] == 0] == [TOKENS, TOKENS]


# -- fine-tuning ----------------------------------------------------------------------------------

MATRICES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")


@pytest.mark.parametrize(("job", "fraction"), [("unlearn", 0.001), ("edit", 0.01), ("unlearn", 0)])
def test_the_authors_optimizer(study, plain, job, fraction):
    """The whole of it in plain PyTorch: Adam with decay, gradients outside the mask zero."""
    clean, corrupted = study.pairs
    target, seen = (clean if job == "unlearn" else corrupted)[0], study.control[:3]
    parameters = [m.weight for name in MATRICES for m in modules(plain, name)]
    original = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        reference = plain(seen.ids[:, :-1]).logits[:, PREFIX - 1 :].log_softmax(-1)
    optimizer = torch.optim.Adam(parameters, lr=1e-5, weight_decay=1.0)
    keep = None
    for _ in range(5):
        current = plain(seen.ids[:, :-1]).logits[:, PREFIX - 1 :].log_softmax(-1)
        kl = (reference.exp() * (reference - current)).sum() / len(seen)
        sign = -0.1 if job == "unlearn" else 0.1
        grads = torch.autograd.grad(kl + sign * nll(plain, target.ids).mean(), parameters)
        if keep is None:
            sizes = torch.cat([g.abs().flatten() for g in grads]).sort(descending=True).values
            least = sizes[max(1, round(fraction * len(sizes))) - 1]
            keep = [(g.abs() >= least) & bool(fraction) for g in grads]
        for parameter, grad, kept in zip(parameters, grads, keep, strict=True):
            parameter.grad = grad * kept
        optimizer.step()
    with tuning.published_edit(study, target, seen, job=job, fraction=fraction):
        for name in MATRICES:
            for layer, module in enumerate(modules(plain, name)):
                weight = study.adapter.weight(layer, name)
                theirs = weight.split(module.weight.detach())
                torch.testing.assert_close(weight.values, theirs, rtol=0, atol=2e-6)
    expected = [p.detach() - o for p, o in zip(parameters, original, strict=True)]
    assert all((change != 0).float().mean() > 0.9 for change in expected)  # every weight moves
    for name in MATRICES:
        for layer in range(4):
            weight = study.adapter.weight(layer, name)
            held = original[MATRICES.index(name) * 4 + layer]
            assert torch.equal(weight.values, weight.split(held))


def test_arms_and_histograms(study):
    outcome = tuning.fine_tuning(study)
    rows = {f.measure: f for f in outcome.findings}
    assert rows["EM of the target: no edit"].ours == TOKENS
    assert rows["EM of the target: unlearn, top 0.1 %"].paper == "26.75"
    assert rows["EM of controls: edit, top 0.1 %"].paper == "38.67"
    assert all(f.low is None for f in outcome.findings)  # two edits have no interval
    assert tuning.em_shares(torch.tensor([[0, 10], [11, 50]])) == {
        "0-10": 50.0, "11-29": 25.0, "30-49": 0.0, "50": 25.0
    }  # fmt: skip


# -- paragraphs and page --------------------------------------------------------------------------


def test_filters():
    ids = torch.tensor([[1, 2, 3, 4], [1, 1, 2, 2], [5, 6, 7, 8], [9, 8, 7, 6], [4, 3, 2, 1]])
    texts = mc.Paragraphs(ids, 2, metadata={"count": (2, 2, 2, 5, 2)})

    def passing(*options):
        return Filters(*options).apply(texts, zoo.tokenizer()).ids[:, 0].tolist()

    assert passing() == [1, 5, 9, 4]  # a half of the second's tokens differ, not more
    assert passing(0.5, ("<8>", "<99>")) == [1, 4]
    assert passing(0.5, (), 2) == [1, 5]  # the count 5 has fewer than two
    with pytest.raises(mc.InputError, match="--per-count"):
        Filters(0.5, (), 2).apply(mc.Paragraphs(ids, 2), None)
    with pytest.raises(mc.InputError, match="every paragraph is dropped"):
        Filters(1.0).apply(texts, None)


def test_pairs_of_a_file(study):
    memorized = study.memorized
    changed = memorized.ids[[2, 0, 1]].clone()
    changed[0, 4] = (changed[0, 4] + 1) % 101  # one prefix token, and another text
    changed[0, PREFIX + 3 :] = (changed[0, PREFIX + 3 :] + 1) % 101
    changed[1, 4:6] = (changed[1, 4:6] + 1) % 101  # two: none
    changed[1, PREFIX:] = (changed[1, PREFIX:] + 1) % 101
    changed[2, 7] = (changed[2, 7] + 1) % 101  # the same continuation: none
    clean, corrupted = given_pairs(memorized, mc.Paragraphs.from_tokens(changed, n_prefix=PREFIX))
    assert torch.equal(clean.ids, memorized.ids[2:3])
    facts = {key: value[0] for key, value in corrupted.metadata.items()}
    assert facts == {
        "position": 4, "replacement": int(changed[0, 4]), "em": 3, "first_impacted": 3
    }  # fmt: skip
    with pytest.raises(mc.InputError, match="--perturbed"):
        given_pairs(memorized, memorized)


def test_the_first_position_is_left_as_it_is(study):
    """Even where its replacement is the most destructive one: it is the paper's baseline."""
    em, nll = study.perturbed.em.clone(), study.perturbed.nll.clone()
    em[:, 0], nll[:, 0] = 0, 1e3
    tried = dataclasses.replace(study.perturbed, em=em, nll=nll)
    assert tried.pairs(model=study.model).corrupted.metadata["position"] == (0,) * 6
    found = found_pairs(study.model, study.memorized, tried)
    assert 0 not in found.corrupted.metadata["position"]


def test_contents_name_every_experiment():
    named = [entry.experiment for entry in contents.CONTENTS]
    assert experiments.EXPERIMENTS is EXPERIMENTS
    assert set(EXPERIMENTS) == {*named, "ablation"}  # which is not in the paper
    part = {"title": "T", "charts": [["Bars", {"title": "C"}]]}
    done = [
        {**part, "name": "sets", "findings": [{"ours": 1}]},
        {**part, "name": "duplication", "findings": [{"ours": None}]},
        {**part, "name": "noise", "findings": [{"ours": 1}, {"ours": None}]},
    ]
    states = {
        entry.experiment: row["state"]
        for entry, row in zip(contents.CONTENTS, contents.contents(done), strict=True)
    }
    assert (states["sets"], states["duplication"]) == ("shown", "not had")
    assert (states["noise"], states["patching"]) == ("in part", "not run")
