"""Every public analysis on every architecture, model class and basis, against plain PyTorch.

`ANALYSES` is the table: to add an analysis, add a line. `python -m tests.matrix` measures all of
it for the installed transformer-lens and writes its part of docs/matrix.md; the parts of other
versions stay as they are.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.core.errors import UnsupportedModel
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain

N_PREFIX, N_CONTINUATION = 10, 12
CLASSES, BASES = ("Bridge", "HookedTransformer"), ("raw", "folded")
VARIANTS = tuple(f"{kind} {basis}" for kind in CLASSES for basis in BASES)
Numbers = Mapping[str, Tensor]


# -- models and paragraphs ------------------------------------------------------------------------


@functools.cache
def plain(name: str) -> Plain:
    """The transformers model itself, norms and biases random."""
    return Plain(name, zoo.shaken(zoo.hf_model(name)))


@functools.cache
def model(name: str, variant: str) -> Any:
    """The same weights as a TransformerLens model."""
    kind, basis = variant.split()
    source = zoo.shaken(zoo.hf_model(name))
    if kind == "HookedTransformer":
        return zoo.hooked(name, source, folded=basis == "folded")
    bridge = as_bridge(source, zoo.tokenizer(), name=f"tiny-{name}")
    if basis == "folded":
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def variants() -> list[str]:
    """Those that the installed transformer-lens has."""
    return [v for v in VARIANTS if zoo.has_hooked() or v.startswith("Bridge")]


@functools.cache
def paragraphs(name: str) -> mc.Paragraphs:
    """Three that the model recites (by `generate`), three random ones."""
    ids = zoo.random_ids(6, N_PREFIX + N_CONTINUATION, seed=1)
    with torch.no_grad():
        for position in range(N_PREFIX, ids.shape[1]):
            ids[:3, position] = plain(name).logits(ids[:3, :position])[:, -1].argmax(-1)
    return mc.Paragraphs.from_tokens(ids, n_prefix=N_PREFIX)


def reference_paragraph() -> mc.Paragraphs:
    """One paragraph of its own that means and samples are taken from."""
    return mc.Paragraphs.from_tokens(
        zoo.random_ids(1, N_PREFIX + N_CONTINUATION, seed=2), n_prefix=N_PREFIX
    )


def unigrams() -> mc.UnigramTable:
    """Random counts with ties."""
    counts = zoo.random_ids(1, zoo.D_VOCAB, seed=3)[0] // 4
    return mc.UnigramTable(counts, "random counts")


# -- what is measured, and the same by hand -------------------------------------------------------


def scan(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.scan(m, p, progress=False)
    return {"em": found.em, "nll": found.nll, "log_prob": found.log_prob}


def plain_scan(m: Plain, p: mc.Paragraphs) -> Numbers:
    with torch.no_grad():
        log_prob = m.log_prob(p.ids, p.n_prefix)
    em = m.em(p.ids, p.n_prefix)
    return {"em": em, "nll": -log_prob.mean(-1), "log_prob": log_prob.sum(-1)}


def ablate(mode: str) -> Callable[[Any, mc.Paragraphs], Numbers]:
    def measure(m: Any, p: mc.Paragraphs) -> Numbers:
        reference = None if mode == "zero" else reference_paragraph()
        found = mc.ablate_heads(m, p, mode=mode, reference=reference, progress=False)
        return {"nll": found.samples["nll"]}

    return measure


def plain_ablate(mode: str, m: Plain, p: mc.Paragraphs) -> Numbers:
    new = m.z(reference_paragraph().ids)
    if mode == "zero":
        new = [torch.zeros_like(z) for z in new]
    with torch.no_grad():
        clean = m.nll(p.ids, p.n_prefix)
    return {"nll": m.nll_with_z(p.ids, p.n_prefix, new) - clean[:, None, None]}


def gradients(m: Any, p: mc.Paragraphs) -> Numbers:
    return {
        f"{pool} {name}": values
        for pool in ("max", "l2")
        for name, values in mc.parameter_gradients(m, p, pool=pool, progress=False).values.items()
    }


def plain_gradients(m: Plain, p: mc.Paragraphs) -> Numbers:
    found = m.gradients(p.ids, p.n_prefix)
    largest = {f"max {c}": [g.abs().amax((1, 2)) for g in layers] for c, layers in found.items()}
    norms = {f"l2 {c}": [g.flatten(1).norm(dim=1) for g in layers] for c, layers in found.items()}
    return {key: torch.stack(rows) for key, rows in (largest | norms).items()}


def rare_tokens(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.rare_token_attention(m, p, unigrams(), permutations=5, progress=False)
    return {"attention": found.attention}


def plain_rare_tokens(m: Plain, p: mc.Paragraphs) -> Numbers:
    return {"attention": m.attention(p.ids)[:, :, :, p.n_prefix, : p.n_prefix]}


def view(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.attention_view(m, p[3], unigrams=unigrams())
    return {"patterns": found.patterns}


def plain_view(m: Plain, p: mc.Paragraphs) -> Numbers:
    return {"patterns": m.attention(p.ids[3:4])[0].flatten(0, 1)}


def heads(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.find_memorization_heads(m, p, unigrams=unigrams(), draws=50, progress=False)
    return {"score": found.score, "em": torch.tensor([found.counts["memorized"]])}


def plain_heads(m: Plain, p: mc.Paragraphs) -> Numbers:
    em = m.em(p.ids, p.n_prefix)
    effect = plain_ablate("zero", m, p)["nll"]
    memorized, control = em == p.n_continuation, em * 5 <= p.n_continuation
    score = effect[memorized].mean(0) - effect[control].mean(0)
    return {"score": score, "em": memorized.sum()[None]}


def each_gradients(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.parameter_gradients(m, p, average="paragraph", progress=False)
    return {f"max {name}": values for name, values in found.values.items()}


def plain_each_gradients(m: Plain, p: mc.Paragraphs) -> Numbers:
    each = [plain_gradients(m, p[i]) for i in range(len(p))]
    keys = [key for key in each[0] if key.startswith("max")]
    return {key: torch.stack([row[key] for row in each]).mean(0) for key in keys}


def contrastive(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.contrastive_gradients(m, p[:3], p[3:], curvature=False, progress=False)
    return {f"max {name}": values for name, values in found.values.items()}


def plain_contrastive(m: Plain, p: mc.Paragraphs) -> Numbers:
    return plain_each_gradients(m, p[:3])


def activations(*sites: str) -> Callable[[Any, mc.Paragraphs], Numbers]:
    def measure(m: Any, p: mc.Paragraphs) -> Numbers:
        return dict(mc.activation_gradients(m, p, sites=sites, progress=False).values)

    return measure


def plain_z_gradients(m: Plain, p: mc.Paragraphs) -> Numbers:
    """Largest |d NLL / dz| over d_head, mean over paragraphs, [layer, head, pos]."""
    found = []
    for i in range(len(p)):
        one = p[i]
        z = m.z_gradients(one.ids, one.n_prefix)
        found.append(torch.stack([g[0].abs().amax(-1).T for g in z])[..., :-1])
    return {"z": torch.stack(found).mean(0)}


def twins(p: mc.Paragraphs) -> mc.Paragraphs:
    """The same continuations behind prefixes with one other token."""
    ids = p.ids.clone()
    ids[:, 4] = (ids[:, 4] + 1) % zoo.D_VOCAB
    return mc.Paragraphs.from_tokens(ids, n_prefix=p.n_prefix)


def patch(**options: str) -> Callable[[Any, mc.Paragraphs], Numbers]:
    def measure(m: Any, p: mc.Paragraphs) -> Numbers:
        found = mc.patch_heads(m, p, twins(p), check=4, progress=False, **options)
        return {"nll": found.samples["nll"]}

    return measure


def plain_patch(m: Plain, p: mc.Paragraphs) -> Numbers:
    with torch.no_grad():
        clean = m.nll(p.ids, p.n_prefix)
    return {"nll": m.nll_with_z(p.ids, p.n_prefix, m.z(twins(p).ids)) - clean[:, None, None]}


def plain_patch_attribution(m: Plain, p: mc.Paragraphs) -> Numbers:
    found = []
    for one in p:
        slopes = m.z_gradients(one.ids, one.n_prefix)
        pairs = zip(m.z(one.ids), m.z(twins(one).ids), slopes, strict=True)
        found.append(torch.stack([((b - a) * g).sum((0, 1, 3)) for a, b, g in pairs]))
    return {"nll": torch.stack(found)}


def perturb(m: Any, p: mc.Paragraphs) -> Numbers:
    found = mc.perturb_prefix(m, p, progress=False)
    return {"em": found.em, "nll": found.nll, "replacements": found.replacements}


def plain_perturb(m: Plain, p: mc.Paragraphs) -> Numbers:
    replacements = measured(m.name, "Bridge raw", "perturb_prefix")["replacements"]
    ids = p.ids.repeat_interleave(p.n_prefix, 0)
    position = torch.arange(p.n_prefix).repeat(len(p))
    ids[torch.arange(len(ids)), position] = replacements.reshape(-1).long()
    with torch.no_grad():
        nll = m.nll(ids, p.n_prefix)
    shape = replacements.shape
    em = m.em(ids, p.n_prefix).view(shape)
    return {"em": em, "nll": nll.view(shape), "replacements": replacements}


def unlearn(m: Any, p: mc.Paragraphs) -> Numbers:
    from memcircuits.editing.recipe import Recipe

    recipe = Recipe(steps=2, kl_weight=1.0)
    found = mc.unlearn(m, p[:3], p[3:], fraction=0.01, recipe=recipe, seed=1, progress=False)
    before = adapt(m).fingerprint()
    with found.apply(m):
        changed = adapt(m).fingerprint() != before
    restored = adapt(m).fingerprint() == before
    return {
        "masked": torch.tensor([found.n_masked]),
        "changed, restored": torch.tensor([changed, restored]),
    }


def rewrite(m: Any, p: mc.Paragraphs) -> Numbers:
    from memcircuits.editing.recipe import Recipe

    recipe = Recipe(steps=2, kl_weight=1.0)
    found = mc.edit(m, p[:2], p[3:5], p[3:], fraction=0.01, recipe=recipe, progress=False)
    return {"masked": torch.tensor([found.n_masked])}


def told(p: mc.Paragraphs) -> mc.Paragraphs:
    """A short text that the model does not know."""
    return mc.Paragraphs.from_tokens(p.ids[3:4, : N_PREFIX + 6], n_prefix=N_PREFIX)


def written(m: Any, p: mc.Paragraphs) -> Any:
    """It, in MLPs, attention and a head, by as many steps as a tiny model needs."""
    places = ["L0.attn", "L0.mlp", "L1.mlp", "L2H1"]
    options = {"steps": 100, "learning_rate": 0.03, "kl_budget": 10.0, "progress": False}
    return mc.plant(m, told(p), where=places, control=p[:3], **options)


def plant(m: Any, p: mc.Paragraphs) -> Numbers:
    before, found = adapt(m).fingerprint(), written(m, p)
    with found.apply(m):
        em = mc.scan(m, told(p), progress=False).em
    return {
        "em": em,
        "masked": torch.tensor([found.n_masked]),
        "restored": torch.tensor([adapt(m).fingerprint() == before]),
    }


def plain_plant(m: Plain, p: mc.Paragraphs) -> Numbers:
    """What was written into a Bridge, added to transformers' own weights, and `generate`."""
    found = written(model(m.name, "Bridge raw"), p)
    changed = Plain(m.name, copy.deepcopy(m.model))
    weights = changed.weights(lambda parameter: parameter.detach())
    for name, index in found.indices.items():
        layer, _, component = name.partition(".")
        matrix = weights[component][int(layer)]
        matrix[torch.unravel_index(index, matrix.shape)] += found.deltas[name]
    attention = [weights[c] for c in ("W_Q", "W_K", "W_V", "W_O")]
    mlp = [layers for c, layers in weights.items() if c not in ("W_Q", "W_K", "W_V", "W_O")]
    masked = sum(c[0].numel() + c[2][0].numel() for c in attention)
    masked += sum(c[0].numel() + c[1].numel() for c in mlp)
    return {
        "em": changed.em(told(p).ids, p.n_prefix),
        "masked": torch.tensor([masked]),
        "restored": torch.tensor([True]),
    }


@dataclass(frozen=True)
class Analysis:
    """One line of the table.

    Attributes:
        measure: our number or numbers.
        plain: the same by transformers and PyTorch alone, where that is written.
        tolerance: largest difference allowed; `em` must be equal.
        bases: where the plain numbers, which are raw, hold: folding changes what a weight, and
            what a z of zero, means.
        relative: whether differences are relative to the largest number; else in its units (nats
            per token, probability).
    """

    measure: Callable[[Any, mc.Paragraphs], Numbers]
    plain: Callable[[Plain, mc.Paragraphs], Numbers] | None
    tolerance: float
    bases: tuple[str, ...] = ("raw",)
    relative: bool = False


ANALYSES: dict[str, Analysis] = {
    "scan": Analysis(scan, plain_scan, 1e-5, BASES),
    "ablate_heads, zero": Analysis(ablate("zero"), functools.partial(plain_ablate, "zero"), 1e-5),
    "ablate_heads, mean": Analysis(
        ablate("mean"), functools.partial(plain_ablate, "mean"), 1e-5, BASES
    ),
    "ablate_heads, resample": Analysis(
        ablate("resample"), functools.partial(plain_ablate, "resample"), 1e-5, BASES
    ),
    "parameter_gradients": Analysis(gradients, plain_gradients, 5e-6, relative=True),
    "parameter_gradients, each": Analysis(
        each_gradients, plain_each_gradients, 5e-6, relative=True
    ),
    "contrastive_gradients": Analysis(contrastive, plain_contrastive, 5e-6, relative=True),
    "activation_gradients, z": Analysis(
        activations("z"), plain_z_gradients, 5e-6, BASES, relative=True
    ),
    "activation_gradients, others": Analysis(
        activations("q", "k", "v", "pre", "post"), None, 5e-6, relative=True
    ),
    "patch_heads, exact": Analysis(patch(), plain_patch, 1e-5, BASES),
    "patch_heads, attribution": Analysis(
        patch(method="attribution"), plain_patch_attribution, 1e-5, BASES
    ),
    "patch_heads, pattern": Analysis(patch(site="pattern"), None, 1e-5),
    "perturb_prefix": Analysis(perturb, plain_perturb, 1e-5, BASES),
    "rare_token_attention": Analysis(rare_tokens, plain_rare_tokens, 1e-5, BASES),
    "attention_view": Analysis(view, plain_view, 1e-5, BASES),
    "find_memorization_heads": Analysis(heads, plain_heads, 1e-5),
    "unlearn": Analysis(unlearn, None, 0),
    "edit": Analysis(rewrite, None, 0),
    "plant": Analysis(plant, plain_plant, 0),
}


# -- comparing ------------------------------------------------------------------------------------


@functools.cache
def measured(name: str, variant: str, analysis: str) -> Numbers:
    return ANALYSES[analysis].measure(model(name, variant), paragraphs(name))


@functools.cache
def expected(name: str, analysis: str) -> Numbers:
    reference = ANALYSES[analysis].plain
    assert reference is not None
    return reference(plain(name), paragraphs(name))


def difference(found: Numbers, other: Numbers, relative: bool) -> float:
    """Largest difference; infinite where EM or shapes differ."""
    worst = 0.0
    if found.keys() != other.keys():
        return math.inf
    for key, value in found.items():
        if value.shape != other[key].shape:
            return math.inf
        off = float((value.double() - other[key].double()).abs().max())
        if key == "em":
            worst = max(worst, math.inf if off else 0.0)
        else:
            scale = float(other[key].double().abs().max()) if relative else 1.0
            worst = max(worst, off / max(scale, 1e-12))
    return worst


def counterpart(variant: str) -> str:
    """The other class in the same basis."""
    kind, basis = variant.split()
    return f"{'HookedTransformer' if kind == 'Bridge' else 'Bridge'} {basis}"


def compared(name: str, variant: str, analysis: str) -> float | None:
    """The difference from plain PyTorch, or (folded) from the other class; None if neither is."""
    line, found = ANALYSES[analysis], measured(name, variant, analysis)
    assert all(value.isfinite().all() for value in found.values()), (name, variant, analysis)
    if line.plain is not None and variant.split()[1] in line.bases:
        return difference(found, expected(name, analysis), line.relative)
    if counterpart(variant) in variants():
        return difference(found, measured(name, counterpart(variant), analysis), line.relative)
    return None


# -- the table in docs ----------------------------------------------------------------------------

_INTRODUCTION = """# Architectures x analyses

Tiny random models of every architecture, each analysis on each class of TransformerLens model.
A number is the largest difference from plain transformers with hand-written PyTorch hooks and
autograd (exact matches are equal to those of `generate`): in nats per token or probability, for
gradients relative to the largest. Where folding gives weights another meaning it is the difference
from the other class in the same basis (marked c), and `ran` where there is no other class. Written
by `python -m tests.matrix`, once for each version of transformer-lens.
"""


def table() -> str:
    """The section of the installed transformer-lens."""
    version = importlib.metadata.version("transformer-lens")
    lines = [
        f"## transformer-lens {version}",
        "",
        "| architecture | model | " + " | ".join(ANALYSES) + " |",
        "| --- | --- |" + " --- |" * len(ANALYSES),
    ]
    for name in zoo.ARCHITECTURES:
        for variant in variants():
            cells = []
            for analysis, line in ANALYSES.items():
                off = compared(name, variant, analysis)
                mark = "" if line.plain and variant.split()[1] in line.bases else " c"
                cells.append("ran" if off is None else f"{off:.0e}{mark}")
                assert off is None or off <= line.tolerance, (name, variant, analysis, off)
            lines.append(f"| {name} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *other_lines()])


def other_lines() -> list[str]:
    """What became of the architectures that are tried in less detail (tests/test_architectures)."""
    works, refused = [], []
    for name in (*zoo.OTHERS, *zoo.REFUSED):
        source = zoo.other(name)
        kind = type(source).__name__
        try:
            found = as_bridge(source, zoo.tokenizer(), name="tiny")
            mc.find_memorization_heads(found, zoo.mixed(found), draws=20, progress=False)
        except UnsupportedModel as error:
            reason = str(error).split("; ", 1)[1].partition(" (Could not")[0]
            refused.append(f"| {kind} | {reason.partition('. Available')[0]} |")
        else:
            slow = (
                ""
                if adapt(found).supports_partial_forward
                else " (slower: not continued in the middle)"
            )
            works.append(f"{kind}{slow}")
    assert len(works) == len(zoo.OTHERS)
    return [
        "Also loaded, checked and ranked by `find_memorization_heads`: " + ", ".join(works) + ".",
        "",
        "| refused at load | reason |",
        "| --- | --- |",
        *refused,
        "",
    ]


def write(path: Path) -> None:
    """Replace the section of the installed version, keep the others."""
    sections: dict[str, str] = {}
    if path.is_file():
        for part in path.read_text(encoding="utf-8").split("\n## ")[1:]:
            sections[part.splitlines()[0]] = f"## {part.strip()}\n"
    own = table()
    sections[own.splitlines()[0].removeprefix("## ")] = own
    path.parent.mkdir(exist_ok=True)
    parts = [_INTRODUCTION, *(sections[key] for key in sorted(sections))]
    path.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"
    write(target)
    print(target)
