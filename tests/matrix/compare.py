"""The table of analyses, and how far our numbers are from those computed by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from tests.helpers.oracle import Plain
from tests.matrix.by_hand import (
    plain_ablate,
    plain_circuit,
    plain_compare,
    plain_components,
    plain_contrast,
    plain_contrastive,
    plain_core,
    plain_counterfactual,
    plain_cut_prefix,
    plain_each_gradients,
    plain_formation,
    plain_gradients,
    plain_heads,
    plain_influence,
    plain_lookups,
    plain_patch,
    plain_patch_attribution,
    plain_perturb,
    plain_plant,
    plain_rare_tokens,
    plain_scan,
    plain_transplant,
    plain_view,
    plain_z_gradients,
)
from tests.matrix.cases import BASES, Numbers, model, paragraphs, plain, variants
from tests.matrix.ours import (
    ablate,
    activations,
    circuit,
    compare,
    components,
    contrast,
    contrastive,
    core,
    counterfactual,
    cut_prefix,
    each_gradients,
    formation,
    gradients,
    heads,
    influence,
    lookups,
    patch,
    perturb,
    plant,
    rare_tokens,
    rewrite,
    scan,
    transplant,
    transplant_activations,
    unlearn,
    view,
)


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
        refused: architectures that it refuses, with a reason.
    """

    measure: Callable[[Any, mc.Paragraphs], Numbers]
    plain: Callable[[Plain, mc.Paragraphs], Numbers] | None
    tolerance: float
    bases: tuple[str, ...] = ("raw",)
    relative: bool = False
    refused: tuple[str, ...] = ()


ANALYSES: dict[str, Analysis] = {
    "scan": Analysis(scan, plain_scan, 1e-5, BASES),
    "counterfactual": Analysis(counterfactual, plain_counterfactual, 2e-5, BASES),
    "compare": Analysis(compare, plain_compare, 2e-5),
    "transplant, weights": Analysis(transplant, plain_transplant, 2e-5),
    "transplant, activations": Analysis(transplant_activations, None, 2e-5),
    "formation": Analysis(formation, plain_formation, 1e-5, BASES),
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
    "contrast": Analysis(contrast, plain_contrast, 1e-5, BASES),
    "influence": Analysis(influence, plain_influence, 1e-3, relative=True),
    "cut_prefix": Analysis(cut_prefix, plain_cut_prefix, 0, BASES),
    "lookups": Analysis(lookups, plain_lookups, 2e-5, BASES, refused=("gemma2",)),
    "recitation_circuit": Analysis(circuit, plain_circuit, 1e-5, BASES, refused=("gemma2",)),
    "core": Analysis(core, plain_core, 1e-5, BASES),
    "rare_token_attention": Analysis(rare_tokens, plain_rare_tokens, 1e-5, BASES),
    "attention_view": Analysis(view, plain_view, 1e-5, BASES),
    "find_memorization_heads": Analysis(heads, plain_heads, 1e-5),
    "find_memorization_components": Analysis(components, plain_components, 2e-5),
    "unlearn": Analysis(unlearn, None, 0),
    "edit": Analysis(rewrite, None, 0),
    "plant": Analysis(plant, plain_plant, 0),
}


@functools.cache
def measured(name: str, variant: str, analysis: str) -> Numbers:
    return ANALYSES[analysis].measure(model(name, variant), paragraphs(name))


@functools.cache
def expected(name: str, analysis: str) -> Numbers:
    reference = ANALYSES[analysis].plain
    assert reference is not None
    return reference(plain(name), paragraphs(name))


def difference(result: Numbers, other: Numbers, relative: bool) -> float:
    """Largest difference; infinite where EM or shapes differ."""
    worst = 0.0
    if result.keys() != other.keys():
        return math.inf
    for key, value in result.items():
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
    """The difference from plain PyTorch, or (folded) from the other class; None if neither is.

    Also None where the analysis refuses the architecture, which is tried.
    """
    line = ANALYSES[analysis]
    if name in line.refused:
        with pytest.raises(UnsupportedModel):
            measured(name, variant, analysis)
        return None
    result = measured(name, variant, analysis)
    assert all(value.isfinite().all() for value in result.values()), (name, variant, analysis)
    if line.plain is not None and variant.split()[1] in line.bases:
        return difference(result, expected(name, analysis), line.relative)
    if counterpart(variant) in variants():
        return difference(result, measured(name, counterpart(variant), analysis), line.relative)
    return None
