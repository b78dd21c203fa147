"""Localizers that intervene on heads, MLPs or blocks, and one that reads attention.

Ablation silences a unit and reads the rise of the NLL, of the targets minus of the controls: what
harms all paragraphs alike is not specific to the targets. Mean and resample ablation take means and
samples from a third set of paragraphs, for targets and controls alike. Patching runs the targets
(clean) and copies of them with random tokens in the prefix (corrupted), and restores one head at a
time.
`rare-token-attention` scores how strongly a head attends to tokens that are rare in the training
text (section 5.4 of the paper).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.benchmark.units import LocalizationTask, Unit
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.ablation import Ablation, Mode
from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.evidence.patching.sweeps import PatchMethod, patch_heads
from memcircuits.evidence.rare_tokens import rare_token_attention
from memcircuits.models.hooks import hook_name

_N_CORRUPTED = 3  # corrupted prompts of each target
_CORRUPTED_FRACTION = 0.2  # of the prefix tokens


def by_ablation(mode: Mode, task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Rise of the NLL when the unit is ablated, of the targets minus of the controls."""
    if unit == "block":
        return _block_effects(task, task.targets) - _block_effects(task, task.control)
    if mode != "zero" and task.reference is None:
        raise InputError("reference", "None", f"{mode} ablation takes a third set of paragraphs")
    reference = None if mode == "zero" else task.reference
    heads = task.adapter.heads()

    def mean_effect(paragraphs: Paragraphs) -> Float[Tensor, " head"]:
        ablation = Ablation(task.model, paragraphs, mode=mode, reference=reference, seed=task.seed)
        return ablation.effects(heads, progress=False)[..., 0].mean(0)

    of_heads = mean_effect(task.targets) - mean_effect(task.control)
    if unit == "head":
        return of_heads
    of_blocks = _block_effects(task, task.targets) - _block_effects(task, task.control)
    return torch.cat([of_heads, of_blocks[1::2]])


def _block_effects(task: LocalizationTask, paragraphs: Paragraphs) -> Float[Tensor, " block"]:
    """Rise of the mean NLL (nats/token) when a layer's whole attention or MLP outputs zeros."""
    adapter = task.adapter
    effects = []
    with adapter.preserving_state():
        run = ResumableRun(adapter, paragraphs)
        clean = run.clean()[:, 0].mean()
        everywhere = torch.ones_like(run.inputs, dtype=torch.bool)[None]
        zeros = torch.zeros(
            *run.inputs.shape, adapter.d_model, dtype=adapter.dtype, device=adapter.device
        )
        for layer in range(adapter.n_layers):
            no_z = torch.zeros_like(run.z[layer][:1, :1])
            edit = HeadEdit(tuple(range(adapter.n_heads)), no_z)
            without_attention = run.edited(layer, [edit])[0, :, 0].mean()
            mlp_out = hook_name("mlp_out", layer)
            without_mlp = run.patched(layer, mlp_out, zeros, everywhere)[0, :, 0].mean()
            effects += [without_attention - clean, without_mlp - clean]
    return torch.stack(effects)


def _clean_and_corrupted(task: LocalizationTask) -> tuple[Paragraphs, Paragraphs]:
    """Each target several times, and as often with some prefix tokens replaced at random."""
    generator = task.generator
    clean = task.targets.ids.repeat(_N_CORRUPTED, 1)
    n_prefix, bos = task.targets.n_prefix, task.targets.bos
    shape = (len(clean), n_prefix)
    random_tokens = torch.randint(task.adapter.d_vocab, shape, generator=generator)
    is_replaced = torch.rand(shape, generator=generator) < _CORRUPTED_FRACTION
    corrupted = clean.clone()
    corrupted[:, :n_prefix] = torch.where(is_replaced, random_tokens, clean[:, :n_prefix])
    return Paragraphs(clean, n_prefix, bos=bos), Paragraphs(corrupted, n_prefix, bos=bos)


def by_patching(method: PatchMethod, task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Effect of restoring a head's clean output in the corrupted prompts."""
    clean, corrupted = _clean_and_corrupted(task)
    patches = patch_heads(
        task.model, clean, corrupted, method=method, check=4, seed=task.seed, progress=False
    )
    return patches.values


def by_attention(task: LocalizationTask, unit: Unit) -> Float[Tensor, " unit"]:
    """Minus the rank correlation of a head's attention with the counts of the tokens."""
    unigrams = task.unigrams or UnigramTable.from_tokens(
        task.control.ids, task.adapter.d_vocab, source="the controls"
    )
    attention = rare_token_attention(
        task.model, task.targets, unigrams, permutations=1, progress=False
    )
    return -attention.values
