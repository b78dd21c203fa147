"""What this package measures, as tensors by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

import memcircuits as mc
from memcircuits.models.registry import adapt
from tests.matrix.cases import Numbers, reference_paragraph, told, twin_model, twins, unigrams

STEP = 1e-3  # of influence


def scan(m: Any, p: mc.Paragraphs) -> Numbers:
    scan_result = mc.scan(m, p, progress=False)
    return {"em": scan_result.em, "nll": scan_result.nll, "log_prob": scan_result.log_prob}


def counterfactual(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.counterfactual(m, twin_model(m), p, ngram=unigrams(), progress=False)
    return {"em": result.twin_em, "remembered": result.remembered}


def compare(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.compare(m, twin_model(m), p, draws=5, progress=False)
    return {"em": result.em, "nll": result.nll, "change": result.head_change.values}


def cut_prefix(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.cut_prefix(m, p, [0], progress=False)
    return {"em": result.recited["naive"][:, 0]}


def transplant(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.transplant(m, twin_model(m), p, units=["attn", "mlp"], progress=False)
    return {name: result.samples[name] for name in ("necessity", "sufficiency")}


def transplant_activations(m: Any, p: mc.Paragraphs) -> Numbers:
    options = {"patched": "activations", "units": ["head", "layer"], "progress": False}
    result = mc.transplant(m, twin_model(m), p, **options)
    return {name: result.samples[name] for name in ("necessity", "sufficiency")}


def formation(m: Any, p: mc.Paragraphs) -> Numbers:
    steps = {0: twin_model(m), 5: m}
    options = {"twins": twin_model(m), "control": p[3:], "max_paragraphs": 2, "progress": False}
    result = mc.formation(steps, p[:3], **options)
    return {"em": result.em, "nll": result.nll, "twin_nll": result.twin_nll}


def influence(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.influence(m, p[:2], p, STEP, progress=False)
    return {"log p": result.values}


def contrast(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.contrast(m, p[:3], p[3:], draws=9, progress=False)
    at = result.features.index("p mean")
    return {"p": torch.cat([result.memorized[:, at], result.control[:, at]])}


def ablate(mode: str) -> Callable[[Any, mc.Paragraphs], Numbers]:
    def measure(m: Any, p: mc.Paragraphs) -> Numbers:
        reference = None if mode == "zero" else reference_paragraph()
        effects = mc.ablate_heads(m, p, mode=mode, reference=reference, progress=False)
        return {"nll": effects.samples["nll"]}

    return measure


def gradients(m: Any, p: mc.Paragraphs) -> Numbers:
    return {
        f"{pool} {name}": values
        for pool in ("max", "l2")
        for name, values in mc.parameter_gradients(m, p, pool=pool, progress=False).values.items()
    }


def rare_tokens(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.rare_token_attention(m, p, unigrams(), permutations=5, progress=False)
    return {"attention": result.attention}


def view(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.attention_view(m, p[3], unigrams=unigrams())
    return {"patterns": result.patterns}


def heads(m: Any, p: mc.Paragraphs) -> Numbers:
    ranking = mc.find_memorization_heads(m, p, unigrams=unigrams(), draws=50, progress=False)
    return {"score": ranking.score, "em": torch.tensor([ranking.counts["memorized"]])}


def components(m: Any, p: mc.Paragraphs) -> Numbers:
    units = ("head", "mlp", "layer", "neuron")
    ranking = mc.find_memorization_components(
        m, p, units=units, unigrams=unigrams(), draws=50, progress=False
    )
    levels = ranking.levels_frame().set_index("level")
    return {
        "score": ranking.score[:, : len(ranking.grid.map_names())],
        "joint": torch.tensor(levels["joint"][["head", "mlp", "all"]].to_numpy()),
    }


def each_gradients(m: Any, p: mc.Paragraphs) -> Numbers:
    gradients = mc.parameter_gradients(m, p, average="paragraph", progress=False)
    return {f"max {name}": values for name, values in gradients.values.items()}


def contrastive(m: Any, p: mc.Paragraphs) -> Numbers:
    gradients = mc.contrastive_gradients(m, p[:3], p[3:], curvature=False, progress=False)
    return {f"max {name}": values for name, values in gradients.values.items()}


def activations(*sites: str) -> Callable[[Any, mc.Paragraphs], Numbers]:
    def measure(m: Any, p: mc.Paragraphs) -> Numbers:
        return dict(mc.activation_gradients(m, p, sites=sites, progress=False).values)

    return measure


def patch(**options: str) -> Callable[[Any, mc.Paragraphs], Numbers]:
    def measure(m: Any, p: mc.Paragraphs) -> Numbers:
        patches = mc.patch_heads(m, p, twins(p), check=4, progress=False, **options)
        return {"nll": patches.samples["nll"]}

    return measure


def perturb(m: Any, p: mc.Paragraphs) -> Numbers:
    perturbed = mc.perturb_prefix(m, p, progress=False)
    return {"em": perturbed.em, "nll": perturbed.nll, "replacements": perturbed.replacements}


def unlearn(m: Any, p: mc.Paragraphs) -> Numbers:
    from memcircuits.editing.recipe import Recipe

    recipe = Recipe(steps=2, kl_weight=1.0)
    edit = mc.unlearn(m, p[:3], p[3:], fraction=0.01, recipe=recipe, seed=1, progress=False)
    before = adapt(m).fingerprint()
    with edit.apply(m):
        changed = adapt(m).fingerprint() != before
    restored = adapt(m).fingerprint() == before
    return {
        "masked": torch.tensor([edit.n_masked]),
        "changed, restored": torch.tensor([changed, restored]),
    }


def rewrite(m: Any, p: mc.Paragraphs) -> Numbers:
    from memcircuits.editing.recipe import Recipe

    recipe = Recipe(steps=2, kl_weight=1.0)
    result = mc.edit(m, p[:2], p[3:5], p[3:], fraction=0.01, recipe=recipe, progress=False)
    return {"masked": torch.tensor([result.n_masked])}


def written(m: Any, p: mc.Paragraphs) -> Any:
    """It, in MLPs, attention and a head, by as many steps as a tiny model needs."""
    places = ["L0.attn", "L0.mlp", "L1.mlp", "L2H1"]
    options = {"steps": 100, "learning_rate": 0.03, "kl_budget": 10.0, "progress": False}
    return mc.plant(m, told(p), where=places, control=p[:3], **options)


def plant(m: Any, p: mc.Paragraphs) -> Numbers:
    before, result = adapt(m).fingerprint(), written(m, p)
    with result.apply(m):
        em = mc.scan(m, told(p), progress=False).em
    return {
        "em": em,
        "masked": torch.tensor([result.n_masked]),
        "restored": torch.tensor([adapt(m).fingerprint() == before]),
    }


def next_token_lookups(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.lookups(m, p, neurons=1, prompts=2, progress=False)
    which = result.is_next_token
    return {
        "neurons": result.neurons[which],
        "prompts": result.prompts[which],
        "activation": result.activation[which],
    }


def lookups(m: Any, p: mc.Paragraphs) -> Numbers:
    numbers = next_token_lookups(m, p)
    return {key: numbers[key] for key in ("neurons", "activation")}


def circuit(m: Any, p: mc.Paragraphs) -> Numbers:
    """Of the first pair whose second text makes the first one's continuation less likely."""
    options: dict[str, Any] = {"draws": 1, "steps": 1, "verify": 0, "progress": False}
    for i, j in itertools.permutations(range(3), 2):
        text = mc.Paragraphs(p.ids[[j]], p.n_prefix, bos=p.bos)
        try:
            result = mc.recitation_circuit(m, p[i], reference=text, faithfulness=1, **options)
        except mc.InputError as error:
            if not str(error).startswith("reference"):
                raise
            continue
        return {"nll": result.nll}
    raise AssertionError("no such pair")


def core(m: Any, p: mc.Paragraphs) -> Numbers:
    result = mc.core(m, p[:3], p[3:], seeds=1, steps=1, progress=False)
    whole = torch.cat([result.scores[f"{of}, whole"] for of in ("memorized", "control")])
    return {"em": whole[:, 0].long(), "nll": whole[:, 2]}
