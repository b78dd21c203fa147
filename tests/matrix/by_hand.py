"""The same numbers by transformers and PyTorch alone."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import memcircuits as mc
from tests.helpers import models as zoo
from tests.helpers.oracle import MLPS, Plain
from tests.matrix.cases import Numbers, model, plain_twin, reference_paragraph, told, twins
from tests.matrix.ours import STEP, next_token_lookups, perturb, written


def plain_scan(m: Plain, p: mc.Paragraphs) -> Numbers:
    with torch.no_grad():
        log_prob = m.log_prob(p.ids, p.n_prefix)
    em = m.em(p.ids, p.n_prefix)
    return {"em": em, "nll": -log_prob.mean(-1), "log_prob": log_prob.sum(-1)}


def plain_counterfactual(m: Plain, p: mc.Paragraphs) -> Numbers:
    twin = plain_twin(m.name)
    with torch.no_grad():
        nats = m.log_prob(p.ids, p.n_prefix) - twin.log_prob(p.ids, p.n_prefix)
    return {"em": twin.em(p.ids, p.n_prefix), "remembered": nats / math.log(2)}


def plain_compare(m: Plain, p: mc.Paragraphs) -> Numbers:
    pair = (m, plain_twin(m.name))
    with torch.no_grad():
        nll = torch.stack([each.nll(p.ids, p.n_prefix) for each in pair])
    em = torch.stack([each.em(p.ids, p.n_prefix) for each in pair])
    first, second = (plain_ablate("zero", each, p)["nll"] for each in pair)
    memorized = (em == p.n_continuation).any(0)
    control = (em * 5 <= p.n_continuation).all(0)
    change = (second - first)[memorized].mean(0) - (second - first)[control].mean(0)
    return {"em": em, "nll": nll, "change": change}


def plain_cut_prefix(m: Plain, p: mc.Paragraphs) -> Numbers:
    """Characters that the decoded text and the true one begin with alike."""
    decode = zoo.tokenizer().decode
    counts = []
    for i in range(len(p)):
        prefix = p.prefix[[i]]
        mask = torch.ones_like(prefix)
        decoded = m.model.generate(
            prefix, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=p.n_continuation,
        )  # fmt: skip
        before = len(decode(prefix[0].tolist()))
        texts = [decode(ids.tolist())[before:] for ids in (decoded[0], p.ids[i])]
        same = [a == b for a, b in zip(*texts, strict=False)]
        counts.append((*same, False).index(False))
    return {"em": torch.tensor(counts)}


def plain_transplant(m: Plain, p: mc.Paragraphs) -> Numbers:
    """NLL of each model with the attention or the MLP of one layer of the other, by copying."""
    pair = [m, plain_twin(m.name)]
    effects = []
    for receiver, donor in (pair, pair[::-1]):
        copied = Plain(m.name, copy.deepcopy(receiver.model))
        own, other = (x.weights(lambda parameter: parameter.detach()) for x in (copied, donor))
        with torch.no_grad():
            clean = copied.nll(p.ids, p.n_prefix)
            for layer in range(m.n_layers):
                for part in (("W_Q", "W_K", "W_V", "W_O"), ("W_gate", "W_in", "W_out")):
                    names = [name for name in part if name in own]
                    kept = [own[name][layer].clone() for name in names]
                    for name in names:
                        own[name][layer].copy_(other[name][layer])
                    effects.append(copied.nll(p.ids, p.n_prefix) - clean)
                    for name, values in zip(names, kept, strict=True):
                        own[name][layer].copy_(values)
    necessity, sufficiency = torch.stack(effects, 1).chunk(2, 1)
    return {"necessity": necessity, "sufficiency": -sufficiency}


def plain_formation(m: Plain, p: mc.Paragraphs) -> Numbers:
    pair, ids = [plain_twin(m.name), m], p.ids[:3]
    with torch.no_grad():
        nll = torch.stack([x.nll(ids, p.n_prefix) for x in pair])
    em = torch.stack([x.em(ids, p.n_prefix) for x in pair])
    return {"em": em, "nll": nll, "twin_nll": nll[[0, 0]]}


def plain_influence(m: Plain, p: mc.Paragraphs) -> Numbers:
    """One step on the log-probability of each of two rows, in the weight matrices only."""
    before, changes = m.log_prob(p.ids, p.n_prefix).sum(-1).detach(), []
    for i in range(2):
        trained = Plain(m.name, copy.deepcopy(m.model).requires_grad_(True))
        seen: list[torch.nn.Parameter] = []
        trained.weights(lambda weight, seen=seen: seen.append(weight) or weight)
        matrices = list({id(weight): weight for weight in seen}.values())
        log_prob = trained.log_prob(p.ids[[i]], p.n_prefix).sum()
        gradients = torch.autograd.grad(log_prob, matrices)
        with torch.no_grad():
            for weight, gradient in zip(matrices, gradients, strict=True):
                weight += STEP * gradient
            changes.append(trained.log_prob(p.ids, p.n_prefix).sum(-1) - before)
    return {"log p": torch.stack(changes)}


def plain_contrast(m: Plain, p: mc.Paragraphs) -> Numbers:
    with torch.no_grad():
        return {"p": m.log_prob(p.ids, p.n_prefix).exp().mean(-1)}


def plain_ablate(mode: str, m: Plain, p: mc.Paragraphs) -> Numbers:
    new = m.z(reference_paragraph().ids)
    if mode == "zero":
        new = [torch.zeros_like(z) for z in new]
    with torch.no_grad():
        clean = m.nll(p.ids, p.n_prefix)
    return {"nll": m.nll_with_z(p.ids, p.n_prefix, new) - clean[:, None, None]}


def plain_gradients(m: Plain, p: mc.Paragraphs) -> Numbers:
    result = m.gradients(p.ids, p.n_prefix)
    largest = {f"max {c}": [g.abs().amax((1, 2)) for g in layers] for c, layers in result.items()}
    norms = {f"l2 {c}": [g.flatten(1).norm(dim=1) for g in layers] for c, layers in result.items()}
    return {key: torch.stack(rows) for key, rows in (largest | norms).items()}


def plain_rare_tokens(m: Plain, p: mc.Paragraphs) -> Numbers:
    return {"attention": m.attention(p.ids)[:, :, :, p.n_prefix, : p.n_prefix]}


def plain_view(m: Plain, p: mc.Paragraphs) -> Numbers:
    return {"patterns": m.attention(p.ids[3:4])[0].flatten(0, 1)}


def plain_heads(m: Plain, p: mc.Paragraphs) -> Numbers:
    em = m.em(p.ids, p.n_prefix)
    effect = plain_ablate("zero", m, p)["nll"]
    memorized, control = em == p.n_continuation, em * 5 <= p.n_continuation
    score = effect[memorized].mean(0) - effect[control].mean(0)
    return {"score": score, "em": memorized.sum()[None]}


def plain_components(m: Plain, p: mc.Paragraphs) -> Numbers:
    em = m.em(p.ids, p.n_prefix)
    memorized, control = em == p.n_continuation, em * 5 <= p.n_continuation
    clean = m.nll(p.ids, p.n_prefix).detach()

    def score(heads: list[tuple[int, int]], mlps: Sequence[int]) -> Tensor:
        with m.without(heads, mlps), torch.no_grad():
            effect = m.nll(p.ids, p.n_prefix) - clean
        return effect[memorized].mean() - effect[control].mean()

    layers, heads = range(m.n_layers), range(m.n_heads)
    of_layer = [[(layer, head) for head in heads] for layer in layers]
    rows = [
        [*(score([head], []) for head in of_layer[i]), score([], [i]), score(of_layer[i], [i])]
        for i in layers
    ]
    everything = [head for some in of_layer for head in some]
    joint = [score(everything, []), score([], layers), score(everything, layers)]
    return {
        "score": torch.stack([torch.stack(row) for row in rows]),
        "joint": torch.stack(joint),
    }


def plain_each_gradients(m: Plain, p: mc.Paragraphs) -> Numbers:
    each = [plain_gradients(m, p[i]) for i in range(len(p))]
    keys = [key for key in each[0] if key.startswith("max")]
    return {key: torch.stack([row[key] for row in each]).mean(0) for key in keys}


def plain_contrastive(m: Plain, p: mc.Paragraphs) -> Numbers:
    return plain_each_gradients(m, p[:3])


def plain_z_gradients(m: Plain, p: mc.Paragraphs) -> Numbers:
    """Largest |d NLL / dz| over d_head, mean over paragraphs, [layer, head, pos]."""
    rows = []
    for i in range(len(p)):
        one = p[i]
        z = m.z_gradients(one.ids, one.n_prefix)
        rows.append(torch.stack([g[0].abs().amax(-1).T for g in z])[..., :-1])
    return {"z": torch.stack(rows).mean(0)}


def plain_patch(m: Plain, p: mc.Paragraphs) -> Numbers:
    with torch.no_grad():
        clean = m.nll(p.ids, p.n_prefix)
    return {"nll": m.nll_with_z(p.ids, p.n_prefix, m.z(twins(p).ids)) - clean[:, None, None]}


def plain_patch_attribution(m: Plain, p: mc.Paragraphs) -> Numbers:
    rows = []
    for one in p:
        slopes = m.z_gradients(one.ids, one.n_prefix)
        pairs = zip(m.z(one.ids), m.z(twins(one).ids), slopes, strict=True)
        rows.append(torch.stack([((b - a) * g).sum((0, 1, 3)) for a, b, g in pairs]))
    return {"nll": torch.stack(rows)}


def plain_perturb(m: Plain, p: mc.Paragraphs) -> Numbers:
    replacements = perturb(model(m.name, "Bridge raw"), p)["replacements"]
    ids = p.ids.repeat_interleave(p.n_prefix, 0)
    position = torch.arange(p.n_prefix).repeat(len(p))
    ids[torch.arange(len(ids)), position] = replacements.reshape(-1).long()
    with torch.no_grad():
        nll = m.nll(ids, p.n_prefix)
    shape = replacements.shape
    em = m.em(ids, p.n_prefix).view(shape)
    return {"em": em, "nll": nll.view(shape), "replacements": replacements}


def plain_plant(m: Plain, p: mc.Paragraphs) -> Numbers:
    """What was written into a Bridge, added to transformers' own weights, and `generate`."""
    result = written(model(m.name, "Bridge raw"), p)
    changed = Plain(m.name, copy.deepcopy(m.model))
    weights = changed.weights(lambda parameter: parameter.detach())
    for name, index in result.indices.items():
        layer, _, component = name.partition(".")
        matrix = weights[component][int(layer)]
        matrix[torch.unravel_index(index, matrix.shape)] += result.deltas[name]
    attention = [weights[c] for c in ("W_Q", "W_K", "W_V", "W_O")]
    mlp = [layers for c, layers in weights.items() if c not in ("W_Q", "W_K", "W_V", "W_O")]
    masked = sum(c[0].numel() + c[2][0].numel() for c in attention)
    masked += sum(c[0].numel() + c[1].numel() for c in mlp)
    return {
        "em": changed.em(told(p).ids, p.n_prefix),
        "masked": torch.tensor([masked]),
        "restored": torch.tensor([True]),
    }


def plain_lookups(m: Plain, p: mc.Paragraphs) -> Numbers:
    """The activations of the neurons at the prompts that were found, read before their matrix."""
    result = next_token_lookups(model(m.name, "Bridge raw"), p)
    activation = torch.empty(result["prompts"].shape[:2])
    for i, (layer, neuron) in enumerate(result["neurons"].tolist()):
        read: list[torch.Tensor] = []
        out = m.blocks[layer].get_submodule(MLPS[m.name]["W_out"])
        handle = out.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        with torch.no_grad():
            m.logits(p.ids[:, :-1])
        handle.remove()
        post = read[0].view(len(p), p.ids.shape[1] - 1, -1)[..., neuron]
        activation[i] = post[result["prompts"][i, :, 0], result["prompts"][i, :, 1]]
    return {"neurons": result["neurons"], "activation": activation}


def plain_circuit(m: Plain, p: mc.Paragraphs) -> Numbers:
    """NLL of a continuation, after its own text and after another's; see `ours.circuit`."""
    with torch.no_grad():
        log_prob = m.logits(p.inputs[:3, :-1])[:, p.n_given - 1 :].float().log_softmax(-1)
    for i, j in itertools.permutations(range(3), 2):
        true = p.continuation[[i]][..., None].expand(2, -1, -1)
        nll = -log_prob[[i, j]].gather(-1, true)[..., 0].mean(-1)
        if nll[1] > nll[0]:
            return {"nll": nll}
    raise AssertionError("no such pair")


def plain_core(m: Plain, p: mc.Paragraphs) -> Numbers:
    return {key: value for key, value in plain_scan(m, p).items() if key != "log_prob"}
