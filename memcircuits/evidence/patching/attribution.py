"""Attribution patching: the effects of all heads from two forward passes and one backward pass.

Every head site acts on the rest of the model through its head's output z. To first order the effect
of a patch on a metric m is therefore

    m(patched) - m(base)  ~=  sum over pos, d_head of  dm/dz * (z_patched - z_base),

with the gradient taken in the base run, for all heads at once.

For z and the attention pattern, z_patched is known. For q, k and v it is recomputed through the
softmax, by running each block by itself on its recorded input. This is the QK fix of AtP* (Kramar
et al. 2024, arXiv 2403.00745), here applied to v too: a saturated softmax has no gradient, but its
output may change a lot. Everything above z stays first-order. How good the estimate is depends on
the model, so some heads are also measured exactly (`check_estimates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.statistics import finite_mean
from memcircuits.evidence.patching.context import MAX_PAIRS_HELD, PatchEffects, PatchingContext
from memcircuits.evidence.patching.exact import exact_head_effects
from memcircuits.evidence.patching.sites import (
    PatchHeadSite,
    sites_to_read,
    values_to_patch,
)
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.batching import rows_that_fit
from memcircuits.models.hooks import ActivationEdit, hook_name


def attribution_effects(
    context: PatchingContext,
    sites: Sequence[PatchHeadSite],
    memory_budget: int | None,
    done: Callable[[int], object],
) -> dict[PatchHeadSite, PatchEffects]:
    """First-order effects of patching each head by itself, on the chosen metric.

    All sites share both forward passes and the backward pass.

    Args:
        context: the pairs; it must measure the chosen metric only.
        sites: what is patched, one site at a time.
        memory_budget: maximum bytes per batch.
        done: called with the number of (pair, layer) combinations after each group of pairs.
    """
    effects: dict[PatchHeadSite, list[Tensor]] = {site: [] for site in sites}
    base_metrics, source_metrics = [], []
    for of_group in _first_order(context, sites, memory_budget):
        for site, by_position in of_group.effects.items():
            by_head = by_position.sum(2)
            if site in ("k", "v"):  # a key-value head acts through all heads of its group
                by_head = by_head.unflatten(-1, (context.adapter.n_kv_heads, -1)).sum(-1)
            effects[site].append(by_head.cpu())
        base_metrics.append(of_group.base_metrics)
        source_metrics.append(of_group.source_metrics)
        done(len(base_metrics[-1]) * context.adapter.n_layers)
    metrics = torch.cat(base_metrics), torch.cat(source_metrics)
    return {site: PatchEffects(torch.cat(parts)[None], *metrics) for site, parts in effects.items()}


def effects_by_position(
    context: PatchingContext, site: Literal["q", "z"], memory_budget: int | None = None
) -> Float[Tensor, "batch layer pos head"]:
    """First-order effects of patching each head at each position by itself.

    What a head reads or writes at a position, its q or z, changes its z at that position alone, so
    the effects of single positions are the terms of the effect of all of them. Positions count from
    the paragraph's first token; the last one predicts nothing and is left out.

    Args:
        context: the pairs; it must measure the chosen metric only, and patch all positions.
        site: what is patched.
        memory_budget: maximum bytes per batch.
    """
    groups = _first_order(context, (site,), memory_budget)
    return torch.cat([group.effects[site].cpu() for group in groups])[:, :, context.clean.n_bos :]


class FirstOrder(NamedTuple):
    """First-order effects in a group of pairs.

    Attributes:
        effects: site -> effect of each head through its z at each position.
        base_metrics: metrics of the run patched into.
        source_metrics: metrics of the other run.
    """

    effects: dict[PatchHeadSite, Float[Tensor, "batch layer pos head"]]
    base_metrics: Float[Tensor, "batch metric"]
    source_metrics: Float[Tensor, "batch metric"]


def _first_order(
    context: PatchingContext, sites: Sequence[PatchHeadSite], memory_budget: int | None
) -> Iterator[FirstOrder]:
    adapter = context.adapter
    n_pos, n_logits = context.base.inputs.shape[1], context.clean.n_continuation
    fit = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    read = tuple(dict.fromkeys(name for site in sites for name in sites_to_read(site)))
    for group in context.groups(min(MAX_PAIRS_HELD, fit)):
        source_cache, source_metrics = context.run_source(group, read)
        base = _base_with_gradients(context, group)
        effects = {}
        for site in sites:
            by_layer = []
            for layer in range(adapter.n_layers):
                z = base.cache[hook_name("z", layer)]
                patched_z = _patched_z(context, site, group, layer, base.cache, source_cache)
                by_layer.append((base.z_gradients[layer] * (patched_z - z)).float().sum(3))
            effects[site] = torch.stack(by_layer, 1)
        yield FirstOrder(effects, base.metrics, source_metrics)


class BaseRun(NamedTuple):
    """The base run of some pairs, differentiated.

    Attributes:
        cache: its z, v and resid_pre in every layer, by name.
        metrics: its metrics.
        z_gradients: gradient of the first metric in z, one tensor per layer.
    """

    cache: dict[str, Tensor]
    metrics: Float[Tensor, "batch metric"]
    z_gradients: tuple[Float[Tensor, "batch pos head d_head"], ...]


def _base_with_gradients(context: PatchingContext, group: slice) -> BaseRun:
    adapter = context.adapter
    tokens = context.base.inputs[group, :-1]
    layers = range(adapter.n_layers)
    # The gradient in a zero that is added to z is that of z, and no parameter is involved.
    shape = (*tokens.shape, adapter.n_heads, adapter.d_head)
    zeros = [
        torch.zeros(shape, dtype=adapter.dtype, device=adapter.device, requires_grad=True)
        for _ in layers
    ]

    def add(zero: Tensor) -> ActivationEdit:
        return lambda z: z + zero

    sites = [
        name
        for layer in layers
        for name in (hook_name("z", layer), hook_name("v", layer), hook_name("resid_pre", layer))
    ]
    with torch.enable_grad():
        run = run_to_continuation(
            adapter,
            context.base,
            group,
            read=sites,
            edit={hook_name("z", layer): add(zeros[layer]) for layer in layers},
        )
        rows = torch.arange(len(tokens), device=adapter.device)
        metrics = context.metrics(group)(run.logits, rows)
        gradients = torch.autograd.grad(metrics[:, 0].sum(), zeros)
    cache = {name: tensor.detach() for name, tensor in run.cache.items()}
    return BaseRun(cache, metrics.detach().float().cpu(), gradients)


def _patched_z(
    context: PatchingContext,
    site: PatchHeadSite,
    group: slice,
    layer: int,
    base_cache: Mapping[str, Tensor],
    source_cache: Mapping[str, Tensor],
) -> Float[Tensor, "batch pos head d_head"]:
    """The z of every head of a layer when the site is patched in all of them.

    Heads of one layer do not see each other, so one run serves all.
    """
    adapter = context.adapter
    patched = context.patched[group].to(adapter.device)[..., None, None]
    name, values = values_to_patch(site, layer, base_cache, source_cache)
    if name == hook_name("z", layer):
        return torch.where(patched, values, base_cache[name])
    recorded: list[Tensor] = []

    def replace(old: Tensor) -> Tensor:
        return torch.where(patched, values, old)

    def record(z: Tensor) -> Tensor:
        recorded.append(z)
        return z

    edit = {name: replace, hook_name("z", layer): record}
    if adapter.supports_partial_forward:
        adapter.run_blocks(layer, base_cache[hook_name("resid_pre", layer)], layer + 1, edit=edit)
    else:
        adapter.run(context.base.inputs[group, :-1], positions=slice(-1, None), edit=edit)
    return recorded[0]


class EstimateCheck(NamedTuple):
    """Estimates beside exact effects, on some heads.

    Attributes:
        exact: exact mean effect of the checked heads, NaN elsewhere.
        agreement: Pearson correlation of estimate and exact effect over the checked heads (`all`),
            the ones with the largest estimates (`top`) and the ones drawn at random (`random`).
        note: what a result says about it.
    """

    exact: Float[Tensor, "layer head"]
    agreement: dict[str, float]
    note: str


def check_estimates(
    context: PatchingContext,
    site: PatchHeadSite,
    effects: PatchEffects,
    n_checked: int,
    seed: int,
    memory_budget: int | None,
) -> EstimateCheck:
    """Measure the heads with the largest estimates, and as many drawn at random, exactly."""
    estimates = finite_mean(effects.values[0])
    top, random = heads_to_check(estimates, n_checked, seed)
    checked = top | random
    measured = exact_head_effects(context, site, checked, memory_budget).values[0]
    exact = torch.full_like(estimates, torch.nan)
    exact[checked] = finite_mean(measured[:, checked])
    agreement = {
        name: correlation(estimates[heads], exact[heads])
        for name, heads in {"all": checked, "top": top, "random": random}.items()
    }
    note = (
        f"estimated to first order; correlation with exact patching {agreement['all']:.3f} "
        f"over {int(checked.sum())} heads ({agreement['random']:.3f} over random ones)"
    )
    return EstimateCheck(exact, agreement, note)


def heads_to_check(
    estimates: Float[Tensor, "layer head"], n_checked: int, seed: int
) -> tuple[Bool[Tensor, "layer head"], Bool[Tensor, "layer head"]]:
    """Masks of the heads with the largest estimates, and of others drawn at random."""
    magnitudes = estimates.abs().flatten()
    order = magnitudes.argsort(descending=True, stable=True)
    n_top = n_checked // 2
    top, others = order[:n_top], order[n_top:]
    generator = torch.Generator().manual_seed(seed)
    drawn = others[torch.randperm(len(others), generator=generator)[: n_checked - n_top]]
    masks = torch.zeros(2, magnitudes.numel(), dtype=torch.bool)
    masks[0, top], masks[1, drawn] = True, True
    return masks[0].view(estimates.shape), masks[1].view(estimates.shape)


def correlation(a: Float[Tensor, " head"], b: Float[Tensor, " head"]) -> float:
    """Pearson's r; NaN for fewer than two heads or constant values."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
