"""Exact patching: the run above the patch is computed anew for every patch.

The base run of a group of pairs is recorded once and continued from the patched layer upwards
(`memcircuits.evidence.interventions.ResumableRun`), so that patching layer l of L costs a fraction
(L - l) / L of a forward pass. All heads of a layer, or all positions, are run in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from memcircuits.evidence.interventions import ResumableRun
from memcircuits.evidence.patching.context import MAX_PAIRS_HELD, PatchEffects, PatchingContext
from memcircuits.evidence.patching.sites import (
    LayerSite,
    PatchHeadSite,
    sites_to_read,
    values_to_patch,
)
from memcircuits.models.hooks import Site, hook_name


def exact_head_effects(
    context: PatchingContext,
    site: PatchHeadSite,
    chosen: Bool[Tensor, "layer head"],
    memory_budget: int | None,
    done: Callable[[int], object] = lambda _: None,
) -> PatchEffects:
    """Effect of patching each chosen head by itself; NaN for the other heads.

    Args:
        context: the pairs.
        site: what is patched.
        chosen: the heads; for `k` and `v` the second axis is the key-value head.
        memory_budget: maximum bytes per batch.
        done: called with the number of pairs after each layer.
    """
    adapter = context.adapter
    n_layers, n_heads = chosen.shape
    effects = _empty_effects(context, n_layers, n_heads)
    also_read: tuple[Site, ...] = ("v",) if site == "pattern" else ()
    for group in context.groups(MAX_PAIRS_HELD):
        metrics = context.metrics(group)
        source_cache, effects.source_metrics[group] = context.run_source(group, sites_to_read(site))
        base_run = _record_base(context, group, memory_budget, also_read)
        base = base_run.clean(metrics)
        effects.base_metrics[group] = base.float().cpu()
        patched = context.patched[group].to(adapter.device)
        for layer in range(n_layers):
            heads = chosen[layer].nonzero().flatten()
            if len(heads):
                # One mask per head: that head alone, at the patched positions.
                one_head = torch.eye(n_heads, dtype=torch.bool)[heads].to(adapter.device)
                masks = one_head[:, None, None] & patched[..., None]
                name, values = values_to_patch(site, layer, base_run.cache, source_cache)
                change = base_run.patched(layer, name, values, masks, metrics) - base
                effects.values[:, group, layer, heads] = change.permute(2, 1, 0).float().cpu()
            done(len(base))
    return effects


def exact_layer_effects(
    context: PatchingContext,
    site: LayerSite,
    positions: Sequence[int],
    memory_budget: int | None,
    done: Callable[[int], object],
) -> PatchEffects:
    """Effect of patching each layer at each position by itself, and at all positions at once.

    Args:
        context: the pairs.
        site: what is patched.
        positions: the positions swept; their effects come first on the last axis, the effect of
            patching all positions of the run at once comes last.
        memory_budget: maximum bytes per batch.
        done: called with the number of pairs after each layer.
    """
    adapter = context.adapter
    n_swept, n_pos = len(positions), context.changed.shape[1]
    effects = _empty_effects(context, adapter.n_layers, n_swept + 1)
    masks = torch.zeros(n_swept + 1, 1, n_pos, dtype=torch.bool, device=adapter.device)
    n_bos = context.clean.n_bos
    masks[torch.arange(n_swept), 0, [n_bos + position for position in positions]] = True
    masks[-1] = True
    for group in context.groups(MAX_PAIRS_HELD):
        metrics = context.metrics(group)
        base_run = _record_base(context, group, memory_budget, [site])
        source_cache, effects.source_metrics[group] = context.run_source(group, [site])
        base = base_run.clean(metrics)
        effects.base_metrics[group] = base.float().cpu()
        # Attention is causal: before the first changed token both runs are the same.
        unchanged = (context.changed[group].cumsum(-1) == 0).to(adapter.device)
        for layer in range(adapter.n_layers):
            name = hook_name(site, layer)
            patched = base_run.patched(layer, name, source_cache[name], masks & ~unchanged, metrics)
            effects.values[:, group, layer] = (patched - base).permute(2, 1, 0).float().cpu()
            done(len(base))
    return effects


def _empty_effects(context: PatchingContext, n_layers: int, n_units: int) -> PatchEffects:
    n_metrics, n_pairs = len(context.metric_names), len(context)
    return PatchEffects(
        values=torch.full((n_metrics, n_pairs, n_layers, n_units), torch.nan),
        base_metrics=torch.empty(n_pairs, n_metrics),
        source_metrics=torch.empty(n_pairs, n_metrics),
    )


def _record_base(
    context: PatchingContext, group: slice, memory_budget: int | None, sites: Sequence[Site]
) -> ResumableRun:
    """The base run of a group of pairs, with the activations of `sites` in all layers."""
    return ResumableRun(
        context.adapter,
        context.base[group],
        memory_budget,
        read=[
            hook_name(site, layer) for site in sites for layer in range(context.adapter.n_layers)
        ],
    )
