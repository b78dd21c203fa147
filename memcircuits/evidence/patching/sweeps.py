"""Activation patching: which activations carry the difference between two prompts?

A pair of prompts is a paragraph and its corrupted counterpart (`Perturbation.pairs`). The clean and
the corrupted run read the same continuation and differ in the prefix alone
(`memcircuits.evidence.patching.context`). One activation of one run is written into the other:

* *noising* patches the corrupted run's activation into the clean run: is the activation necessary
  for the recitation?
* *denoising* patches the clean run's activation into the corrupted run: is it sufficient to restore
  the recitation?

With m a metric of the clean continuation, base the run patched into and source the other one,

    effect            = m(patched) - m(base),
    total effect      = m(source) - m(base),
    normalized effect = mean effect / mean total effect (`share` in results).

Patching the lowest residual stream at all positions gives the total effect.

*Exact* patching runs the model above each patch (`memcircuits.evidence.patching.exact`).
*Attribution* patching estimates the effects of all heads from two forward passes and one backward
pass (`memcircuits.evidence.patching.attribution`); the heads with the largest estimates and some
drawn at random are then measured exactly, and the result carries the correlation of both.

The paper does this in its appendix, by attribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from memcircuits.base.errors import InputError, UnsupportedModel, at_least, one_of
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_mean
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import ParagraphsLike
from memcircuits.evidence.patching.attribution import (
    EstimateCheck,
    attribution_effects,
    check_estimates,
)
from memcircuits.evidence.patching.context import (
    Direction,
    PatchEffects,
    PatchingContext,
    Positions,
)
from memcircuits.evidence.patching.exact import exact_head_effects, exact_layer_effects
from memcircuits.evidence.patching.metrics import METRIC_UNITS, CustomMetric, MetricName
from memcircuits.evidence.patching.results import LayerPatches, PatchMap
from memcircuits.evidence.patching.sites import (
    LAYER_SITES,
    PATCH_HEAD_SITES,
    LayerSite,
    PatchHeadSite,
)
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.hooks import hook_name

PatchMethod = Literal["exact", "attribution"]


@plain_torch()
def patch_heads(  # noqa: PLR0913
    model: Model,
    clean: ParagraphsLike,
    corrupted: ParagraphsLike,
    *,
    site: PatchHeadSite = "z",
    positions: Positions = None,
    metric: MetricName | CustomMetric = "nll",
    direction: Direction = "noising",
    method: PatchMethod = "exact",
    check: int = 10,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> PatchMap:
    """Patch each head by itself.

    Args:
        model: the model.
        clean: the paragraphs.
        corrupted: their corrupted counterparts, row by row, of the same lengths. Only their
            prefixes are run; where the continuations first differ is the first impacted token.
        site: `q`, `k`, `v`, `z` or `pattern`. In grouped-query models k and v belong to key-value
            heads, and the result's `axis` is `kv_head`.
        positions: where to patch: None for everywhere, `changed` for the prefix tokens that differ,
            or a list. For `pattern` these are the attending positions, for k and v the attended.
        metric: of the clean continuation: `nll` (nats/token), `em` (tokens), `first_impacted` (-log
            p of the first impacted token, nats), `logit_diff` (its logit minus that of the token in
            its place in `corrupted`), or a function from the logits that predict the continuation,
            [batch, pos, d_vocab], and indices into `clean`, [batch], to one number per row.
        direction: `noising` (corrupted into clean) or `denoising` (clean into corrupted).
        method: `exact`, or `attribution` for a first-order estimate (not for `em`);
            `attribution_patching` estimates several sites at once.
        check: attribution: number of heads measured exactly too, half of them those with the
            largest estimates, half drawn by `seed`.
        seed: of that draw.
        memory_budget: maximum bytes per batch; by default a third of the free memory.
        progress: show a bar on stderr.

    Returns:
        A `PatchMap` with `samples` per pair, [paragraph, layer, head]; `exact` patching measures
        all metrics that are defined, attribution the chosen one.

    Raises:
        InputError: for wrong options, unequal lengths, or a metric of the first impacted token
            where the continuations of a pair are equal.
        UnsupportedModel: if the model's z is not pattern @ v (site `pattern`).

    Example:
        >>> corrupted = memorized.ids[:1].clone()
        >>> corrupted[0, 49] = 7  # another last token of the prefix
        >>> effect = mc.patch_heads(model, memorized[:1], corrupted, site="z")
        >>> print(effect)
        noising z: nll [nats/token], 6 layers x 8; L3H7 carries most, 2.7%
    """
    one_of("site", site, PATCH_HEAD_SITES)
    one_of("method", method, get_args(PatchMethod))
    at_least("check", check, 4)
    if method == "attribution":
        return attribution_patching(
            model,
            clean,
            corrupted,
            sites=(site,),
            positions=positions,
            metric=metric,
            direction=direction,
            check=check,
            seed=seed,
            memory_budget=memory_budget,
            progress=progress,
        )[site]
    context = PatchingContext.of(model, clean, corrupted, metric, direction, positions)
    adapter = context.adapter
    every = torch.ones(adapter.n_layers, _heads_of(adapter, site), dtype=torch.bool)
    steps = len(context) * adapter.n_layers
    with (
        adapter.preserving_state(),
        bar(steps, f"patch {site}", unit="layer", progress=progress) as progress_bar,
    ):
        effects = exact_head_effects(context, site, every, memory_budget, progress_bar.update)
    return _patch_map(context, site, effects, method=method, check=check, seed=seed)


@plain_torch()
def attribution_patching(  # noqa: PLR0913
    model: Model,
    clean: ParagraphsLike,
    corrupted: ParagraphsLike,
    *,
    sites: Sequence[PatchHeadSite] = PATCH_HEAD_SITES,
    positions: Positions = None,
    metric: MetricName | CustomMetric = "nll",
    direction: Direction = "noising",
    check: int = 10,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> dict[PatchHeadSite, PatchMap]:
    """`patch_heads(method="attribution")` of several sites, which share all passes of the estimate.

    Args:
        model: the model.
        clean: as in `patch_heads`.
        corrupted: as in `patch_heads`.
        sites: what is patched, one site at a time.
        positions: as in `patch_heads`, as are the other arguments.
        metric: not `em`, which has no gradient.
        direction: `noising` or `denoising`.
        check: number of heads of each site measured exactly too.
        seed: of those drawn at random.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        Site -> its `PatchMap`.

    Raises:
        InputError: as `patch_heads`.
        UnsupportedModel: as `patch_heads`.
    """
    for site in sites:
        one_of("sites", site, PATCH_HEAD_SITES)
    if metric == "em":
        raise InputError("metric", "'em'", "it has no gradient; use method='exact' or another one")
    at_least("check", check, 4)
    context = PatchingContext.of(model, clean, corrupted, metric, direction, positions)
    context = context.with_chosen_metric_only()
    adapter, given = context.adapter, {"method": "attribution", "check": check, "seed": seed}
    steps = len(context) * adapter.n_layers
    maps = {}
    with (
        adapter.preserving_state(),
        bar(steps, f"patch {', '.join(sites)}", unit="layer", progress=progress) as progress_bar,
    ):
        by_site = attribution_effects(context, sites, memory_budget, progress_bar.update)
        for site, effects in by_site.items():
            checked = check_estimates(context, site, effects, check, seed, memory_budget)
            maps[site] = _patch_map(context, site, effects, checked, **given)
    return maps


def _heads_of(adapter: Adapter, site: PatchHeadSite) -> int:
    return adapter.n_kv_heads if site in ("k", "v") else adapter.n_heads


def _patch_map(
    context: PatchingContext,
    site: PatchHeadSite,
    effects: PatchEffects,
    checked: EstimateCheck | None = None,
    **options: Any,
) -> PatchMap:
    adapter = context.adapter
    names, values = context.metric_names, effects.masked()
    notes = context.notes(values[0])
    return PatchMap(
        name=f"{context.direction} {site}: {names[0]}",
        units=METRIC_UNITS.get(names[0], ""),
        values=finite_mean(values[0]),
        provenance=context.provenance(site=site, **options),
        samples=dict(zip(names, values, strict=True)),
        notes=(*notes, checked.note) if checked else notes,
        axis="head" if _heads_of(adapter, site) == adapter.n_heads else "kv_head",
        base=dict(zip(names, effects.base_metrics.T, strict=True)),
        source=dict(zip(names, effects.source_metrics.T, strict=True)),
        exact=checked.exact if checked else torch.empty(0),
        agreement=checked.agreement if checked else {},
    )


@plain_torch()
def patch_layers(  # noqa: PLR0913
    model: Model,
    clean: ParagraphsLike,
    corrupted: ParagraphsLike,
    *,
    site: LayerSite = "resid_pre",
    positions: Sequence[int] | None = None,
    metric: MetricName | CustomMetric = "nll",
    direction: Direction = "noising",
    memory_budget: int | None = None,
    progress: bool = True,
) -> LayerPatches:
    """Patch each layer at each position by itself, and at all positions at once. Always exact.

    Args:
        model: the model.
        clean: as in `patch_heads`.
        corrupted: as in `patch_heads`.
        site: `resid_pre`, `resid_mid` (not where attention and MLP are parallel), `attn_out` or
            `mlp_out`.
        positions: the positions swept, by default the whole prefix.
        metric: as in `patch_heads`.
        direction: `noising` or `denoising`.
        memory_budget: maximum bytes per batch; by default a third of the free memory.
        progress: show a bar on stderr.

    Returns:
        `LayerPatches` with `samples` per pair, [paragraph, layer, pos].

    Raises:
        InputError: as `patch_heads`.
        UnsupportedModel: if the model has no such site.
    """
    one_of("site", site, LAYER_SITES)
    if isinstance(positions, str):
        raise InputError("positions", repr(positions), "give a list of positions")
    context = PatchingContext.of(model, clean, corrupted, metric, direction, positions)
    adapter = context.adapter
    _check_layer_site(adapter, site)
    swept = tuple(range(context.n_prefix)) if positions is None else tuple(positions)
    steps = len(context) * adapter.n_layers
    with (
        adapter.preserving_state(),
        bar(steps, f"patch {site}", unit="layer", progress=progress) as progress_bar,
    ):
        effects = exact_layer_effects(context, site, swept, memory_budget, progress_bar.update)
    names, values = context.metric_names, effects.masked()
    samples = dict(zip(names, values[..., :-1], strict=True))
    return LayerPatches(
        name=f"{direction} {site}: {names[0]}",
        units=METRIC_UNITS.get(names[0], ""),
        values=finite_mean(samples[names[0]]),
        whole=finite_mean(values[0, ..., -1]),
        positions=swept,
        samples=samples,
        base=dict(zip(names, effects.base_metrics.T, strict=True)),
        source=dict(zip(names, effects.source_metrics.T, strict=True)),
        provenance=context.provenance(site=site),
        notes=context.notes(values[0]),
    )


def _check_layer_site(adapter: Adapter, site: LayerSite) -> None:
    """Raise `UnsupportedModel` unless the model has the site."""
    parallel = adapter.parallel
    if hook_name(site, 0) not in adapter.hook_names or (site == "resid_mid" and parallel):
        reason = "its attention and MLP are parallel" if parallel else "it has none"
        raise UnsupportedModel("site", repr(site), f"{adapter.name}: {reason}; patch resid_pre")
