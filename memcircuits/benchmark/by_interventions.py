"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor

from memcircuits.benchmark.units import LocalizationTask
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.interventions import HeadEdit, ResumableRun
from memcircuits.evidence.patching.sweeps import patch_heads
from memcircuits.evidence.rare_tokens import rare_token_attention
from memcircuits.models.hooks import hook_name

_TWINS = 3  # perturbed twins of each target


_PERTURBED = 0.2  # of a twin's prefix tokens


def by_ablation(mode: str, case: LocalizationTask, unit: str) -> Tensor:
    if unit == "block":
        return _block_effects(case, case.targets) - _block_effects(case, case.control)
    reference = None if mode == "zero" else case.control
    effects = [
        Ablation(case.model, p, mode=mode, reference=reference, seed=case.seed)
        .effects(case.adapter.heads(), progress=False)[..., 0]
        .mean(0)
        for p in (case.targets, case.control)
    ]
    return effects[0] - effects[1]


def _block_effects(case: LocalizationTask, paragraphs: Paragraphs) -> Tensor:
    """Rise of NLL when a layer's whole attention or MLP is silenced."""
    adapter = case.adapter
    rows = []
    with adapter.preserving_state():
        restart = ResumableRun(adapter, paragraphs.ids, paragraphs.n_prefix)
        clean = restart.clean()[:, 0].mean()
        for layer in range(adapter.n_layers):
            silent = torch.zeros_like(restart.z[layer][:1, :1])
            edit = HeadEdit(tuple(range(adapter.n_heads)), silent)
            rows.append(restart.edited(layer, [edit])[0, :, 0].mean() - clean)
            name = hook_name("mlp_out", layer)
            source = torch.zeros(
                *restart.inputs.shape, adapter.d_model, dtype=adapter.dtype, device=adapter.device
            )
            everywhere = torch.ones_like(restart.inputs, dtype=torch.bool)[None]
            found = restart.patched(layer, name, source, everywhere)
            rows.append(found[0, :, 0].mean() - clean)
    return torch.stack(rows)


def _twins(case: LocalizationTask) -> tuple[Paragraphs, Paragraphs]:
    """Each target several times, and as often with some prefix tokens replaced at random."""
    generator = case.generator
    ids = case.targets.ids.repeat(_TWINS, 1)
    n = case.targets.n_prefix
    noise = torch.randint(case.adapter.d_vocab, (len(ids), n), generator=generator)
    chosen = torch.rand(len(ids), n, generator=generator) < _PERTURBED
    twins = ids.clone()
    twins[:, :n] = torch.where(chosen, noise, ids[:, :n])
    return Paragraphs(ids, n), Paragraphs(twins, n)


def by_patching(method: str, case: LocalizationTask, unit: str) -> Tensor:
    clean, twins = _twins(case)
    found = patch_heads(
        case.model, clean, twins, method=method, check=4, seed=case.seed, progress=False
    )
    return found.values


def by_attention(case: LocalizationTask, unit: str) -> Tensor:
    table = case.unigrams or UnigramTable.from_tokens(
        case.control.ids, case.adapter.d_vocab, source="the controls"
    )
    found = rare_token_attention(case.model, case.targets, table, permutations=1, progress=False)
    return -found.values
