"""A saved result of every kind, small: what is spoiled and what is asked for its provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import memcircuits as mc
from memcircuits.editing.evaluation import evaluate_edit
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.evidence.direct_writes import writes
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from tests.helpers import models as zoo
from tests.helpers.document import words
from tests.helpers.results import result_types

RESULTS = (
    "Scan",
    "Counterfactual",
    "Core",
    "Lookups",
    "Transplant",
    "Formation",
    "ScoreMap",
    "ParameterGradients",
    "ActivationGradients",
    "RareTokenAttention",
    "PatchMap",
    "Perturbation",
    "Ranking",
    "Edit",
    "Planted",
    "EditReport",
    "Recovery",
    "LayerPatches",
    "MinimalSets",
    "CutPrefix",
    "Influence",
    "DocumentMap",
    "Contrast",
    "NoiseCurve",
    "Writes",
    "EditAudit",
)
"""The types of result, which name their files."""

FILES = (*RESULTS, "UnigramTable")
"""All kinds of safetensors file that the package writes and reads."""


def save_all(model: nn.Module, folder: Path) -> Path:
    """Save a result of every kind, each in the file of its type."""
    paragraphs = zoo.mixed(model, n=3)
    memorized, control = paragraphs[:3], paragraphs[3:]
    clean, corrupted = paragraphs[:2], paragraphs[2:4]
    quiet: dict[str, Any] = {"progress": False}
    edit = mc.unlearn(model, memorized, control, recipe=Recipe(steps=1), **quiet)
    results = [
        mc.scan(model, paragraphs, **quiet),
        mc.compare(model, model, paragraphs, draws=5, **quiet),
        mc.counterfactual(model, model, paragraphs, **quiet),
        mc.core(model, memorized, control, seeds=2, steps=2, **quiet),
        mc.recitation_circuit(model, memorized[0], draws=1, steps=1, verify=1, **quiet),
        mc.lookups(model, paragraphs, neurons=1, prompts=2, **quiet),
        mc.transplant(model, model, paragraphs, units=["head", "all"], **quiet),
        mc.formation([model, model], paragraphs, twins=model, max_paragraphs=2, **quiet),
        mc.ablate_heads(model, paragraphs, **quiet),
        mc.parameter_gradients(model, paragraphs, **quiet),
        mc.activation_gradients(model, paragraphs, sites=["z"], **quiet),
        mc.rare_token_attention(model, paragraphs, permutations=3, **quiet),
        mc.patch_heads(model, clean, corrupted, **quiet),
        mc.perturb_prefix(model, paragraphs, **quiet),
        mc.find_memorization_heads(model, paragraphs, draws=20, **quiet),
        mc.document_map(model, words(paragraphs), n_prefix=10, n_continuation=12, **quiet),
        edit,
        mc.plant(model, paragraphs[3], where=["L0.mlp", "L1.mlp"], kl_budget=99.0, **quiet),
        evaluate_edit(model, edit, memorized, control, attacks=1, **quiet),
        recovery_curve(model, edit, memorized, control, steps=1, **quiet),
        patch_layers(model, clean, corrupted, positions=[0], **quiet),
        mc.cut_prefix(model, paragraphs, [0, 1], **quiet),
        mc.contrast(model, memorized, control, draws=9, **quiet),
        mc.influence(model, paragraphs[:2], **quiet),
        minimal_sets(model, paragraphs[:1], max_tokens=1, **quiet),
        weight_noise(model, memorized, control, sizes=(0.1,), draws=1, **quiet),
        writes(model, memorized, ["L0H1", "L1.mlp"], **quiet),
        mc.audit_edit(model, edit, memorized, control, attacks=1, relearning_steps=1, **quiet),
    ]
    assert {type(result) for result in results} == set(result_types().values())  # a new one: add it
    for result in results:
        result.save(folder / f"{type(result).__name__}.safetensors")
    mc.UnigramTable(torch.arange(zoo.D_VOCAB), "counts").save(folder / "UnigramTable.safetensors")
    return folder
