"""Which activation carries it? Activations of a perturbed run are put into the clean one, or back.

A pair is a paragraph and its perturbed twin (`Perturbation.pairs`). Two runs are compared that read
the same continuation, the clean one, and differ in the prefix alone:

* the clean run reads the clean prefix and the clean continuation,
* the corrupted run reads the corrupted prefix and the clean continuation.

*Noising* runs the clean one with one activation of the corrupted run in it: what does the
recitation need? *Denoising* runs the corrupted one with one activation of the clean run in it: what
is enough to bring it back? Every metric is about the clean continuation in both directions. An
effect is the metric of the patched run minus that of the run patched into; patching everything at
the lowest residual stream gives the whole difference between the two runs, and `share` is the part
of it that a patch carries.

*Exact* patching continues the run above the patch (`memcircuits.evidence.interventions`). Key and value heads are
patched as they are computed, one per group of heads that share them. A pattern acts through its
head's z = pattern @ v, because on several architectures a Bridge ignores writes to the pattern.

*Attribution* patching (`memcircuits.evidence.patching.attribution`) estimates all heads from two forward passes and
one backward pass. The heads with the largest estimates and some drawn at random are then measured
exactly, and the result carries the correlation of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.core.errors import InputError, UnsupportedModel, at_least, one_of
from memcircuits.core.progress import bar
from memcircuits.core.statistics import finite_mean
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.evidence.patching.attribution import attribute, correlation, heads_to_check
from memcircuits.evidence.patching.pairs import (
    GROUP,
    HEAD_SITES,
    LAYER_SITES,
    UNITS,
    Metric,
    Pair,
    new_values,
    sites_read,
)
from memcircuits.evidence.patching.results import LayerPatches, PatchMap, effect_notes
from memcircuits.models.hooks import hook_name


def patch_heads(
    model: Any,
    clean: Any,
    corrupted: Any,
    *,
    site: str = "z",
    positions: str | Sequence[int] | None = None,
    metric: str | Metric = "nll",
    direction: str = "noising",
    method: str = "exact",
    check: int = 10,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> PatchMap:
    """Patch each head by itself.

    Args:
        model: HookedTransformer or TransformerBridge.
        clean: `Paragraphs`, a list of strings or a LongTensor of ids.
        corrupted: their twins, row by row, of the same lengths. Only their prefixes are run; where
            their continuations first differ is the first impacted token.
        site: `q`, `k`, `v`, `z` or `pattern`. In grouped-query models k and v belong to key-value
            heads, and the result's `axis` says `kv_head`.
        positions: where to patch: None for everywhere, `changed` for the prefix tokens that differ,
            or a list. For `pattern` these are the attending positions, for k and v the attended.
        metric: of the clean continuation: `nll` (nats/token), `em` (tokens), `first_impacted` (-log
            p of the first impacted token, nats), `logit_diff` (its logit minus that of the token in
            its place in `corrupted`), or a function from logits [batch, pos, d_vocab], which predict
            the continuation, and indices into `clean` to one number per row.
        direction: `noising` (corrupted into clean) or `denoising` (clean into corrupted).
        method: `exact`, or `attribution` for an estimate (not for `em`).
        check: attribution: so many heads are measured exactly, half of them the largest estimates,
            half drawn by `seed`.
        seed: of that draw.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        A `PatchMap`; `samples` keeps every pair, and with `exact` all metrics that can be had.

    Raises:
        InputError: for wrong options, unequal lengths, or a metric of the first impacted token
            where the continuations of a pair are equal.
        UnsupportedModel: if the model's attention is not z = pattern @ v (site `pattern`).

    Example:
        >>> twin = memorized.ids[:1].clone()
        >>> twin[0, 49] = 7  # another last token of the prefix
        >>> effect = mc.patch_heads(model, memorized[:1], twin, site="z")
        >>> print(effect)
        noising z: nll [nats/token], 6 layers x 8; L1H2 carries most, 3.9%
    """
    one_of("site", site, HEAD_SITES)
    one_of("method", method, ("exact", "attribution"))
    if method == "attribution" and metric == "em":
        raise InputError("metric", "'em'", "it has no gradient; use method='exact' or another one")
    at_least("check", check, 4)
    pair = Pair.of(model, clean, corrupted, metric, direction, positions)
    adapter = pair.adapter
    shape = (adapter.n_layers, adapter.n_kv_heads if site in ("k", "v") else adapter.n_heads)
    exact, agreement = torch.empty(0), {}
    with (
        adapter.preserving_state(),
        bar(len(pair) * shape[0], f"patch {site}", unit="layer", progress=progress) as shown,
    ):
        if method == "exact":
            every = torch.ones(shape, dtype=torch.bool)
            effects, ends = _exact(pair, site, every, memory_budget, shown.update)
        else:
            pair = dataclasses.replace(pair, names=pair.names[:1])
            effects, ends = attribute(pair, site, memory_budget, shown.update)
            estimate = finite_mean(effects[0])
            top, random = heads_to_check(estimate, check, seed)
            measured, _ = _exact(pair, site, top | random, memory_budget)
            exact = torch.full(shape, torch.nan)
            exact[top | random] = finite_mean(measured[0][:, top | random])
            agreement = {
                name: correlation(estimate[heads], exact[heads])
                for name, heads in {"all": top | random, "top": top, "random": random}.items()
            }
    # An EM read off logits that are not finite means nothing.
    effects = effects.where(effects.isfinite().all(0), torch.nan)
    name = pair.names[0]
    notes = effect_notes(pair, effects[0])
    if agreement:
        notes = (
            *notes,
            f"estimated to first order; correlation with exact patching {agreement['all']:.3f} "
            f"over {int((top | random).sum())} heads ({agreement['random']:.3f} over random ones)",
        )
    return PatchMap(
        name=f"{direction} {site}: {name}",
        units=UNITS.get(name, ""),
        values=finite_mean(effects[0]),
        provenance=pair.provenance(site=site, method=method, check=check, seed=seed),
        samples=dict(zip(pair.names, effects, strict=True)),
        notes=notes,
        axis="head" if shape[1] == adapter.n_heads else "kv_head",
        base=dict(zip(pair.names, ends[0].T, strict=True)),
        source=dict(zip(pair.names, ends[1].T, strict=True)),
        exact=exact,
        agreement=agreement,
    )


def patch_layers(
    model: Any,
    clean: Any,
    corrupted: Any,
    *,
    site: str = "resid_pre",
    positions: Sequence[int] | None = None,
    metric: str | Metric = "nll",
    direction: str = "noising",
    memory_budget: int | None = None,
    progress: bool = True,
) -> LayerPatches:
    """Patch each layer at each position by itself, and at all positions at once. Always exact.

    Args:
        model: HookedTransformer or TransformerBridge.
        clean: as in `patch_heads`.
        corrupted: as in `patch_heads`.
        site: `resid_pre`, `resid_mid` (not where attention and MLP are parallel), `attn_out` or
            `mlp_out`.
        positions: those swept, by default the whole prefix.
        metric: as in `patch_heads`.
        direction: `noising` or `denoising`.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `LayerPatches`.

    Raises:
        InputError: as `patch_heads`.
        UnsupportedModel: if the model has no such site.
    """
    one_of("site", site, LAYER_SITES)
    if isinstance(positions, str):
        raise InputError("positions", repr(positions), "give a list of positions")
    pair = Pair.of(model, clean, corrupted, metric, direction, positions)
    adapter = pair.adapter
    if hook_name(site, 0) not in adapter.hook_names or (site == "resid_mid" and adapter.parallel):
        why = "its attention and MLP are parallel" if adapter.parallel else "it has none"
        raise UnsupportedModel("site", repr(site), f"{adapter.name}: {why}; patch resid_pre")
    swept = tuple(range(pair.n_prefix)) if positions is None else tuple(positions)
    n_input = pair.base_ids.shape[1] - 1
    # One mask per position swept, and one for all positions.
    where = torch.zeros(len(swept) + 1, 1, n_input, dtype=torch.bool, device=adapter.device)
    where[torch.arange(len(swept)), 0, list(swept)] = True
    where[-1] = True
    n, n_layers = len(pair), adapter.n_layers
    effects = torch.empty(len(pair.names), n, n_layers, len(swept) + 1)
    ends = torch.empty(2, n, len(pair.names))
    with (
        adapter.preserving_state(),
        bar(n * n_layers, f"patch {site}", unit="layer", progress=progress) as shown,
    ):
        for rows in pair.groups(GROUP):
            measure = pair.measure(rows)
            restart = ResumableRun(
                adapter,
                pair.base_ids[rows],
                pair.n_prefix,
                memory_budget,
                read=[hook_name(site, layer) for layer in range(n_layers)],
            )
            source, ends[1, rows] = pair.read(rows, (site,))
            base = restart.clean(measure)
            ends[0, rows] = base.float().cpu()
            # Attention looks back only: before the first changed token both runs are the same.
            same = (pair.changed[rows].cumsum(-1) == 0).to(adapter.device)
            for layer in range(n_layers):
                name = hook_name(site, layer)
                found = restart.patched(layer, name, source[name], where & ~same, measure) - base
                effects[:, rows, layer] = found.permute(2, 1, 0).float().cpu()
                shown.update(len(base))
    effects = effects.where(effects.isfinite().all(0), torch.nan)
    name = pair.names[0]
    samples = dict(zip(pair.names, effects[..., :-1], strict=True))
    return LayerPatches(
        name=f"{direction} {site}: {name}",
        units=UNITS.get(name, ""),
        values=finite_mean(samples[name]),
        whole=finite_mean(effects[0, ..., -1]),
        positions=swept,
        samples=samples,
        base=dict(zip(pair.names, ends[0].T, strict=True)),
        source=dict(zip(pair.names, ends[1].T, strict=True)),
        provenance=pair.provenance(site=site),
        notes=effect_notes(pair, effects[0]),
    )


def _exact(
    pair: Pair,
    site: str,
    chosen: Bool[Tensor, "layer head"],
    memory_budget: int | None,
    done: Callable[[int], None] = lambda _: None,
) -> tuple[Float[Tensor, "metric batch layer head"], Float[Tensor, "end batch metric"]]:
    """Effects of the chosen heads, NaN for the others; metrics of both runs."""
    adapter = pair.adapter
    n, (n_layers, n_heads) = len(pair), chosen.shape
    effects = torch.full((len(pair.names), n, n_layers, n_heads), torch.nan)
    ends = torch.empty(2, n, len(pair.names))
    for rows in pair.groups(GROUP):
        measure = pair.measure(rows)
        values = ["v"] if site == "pattern" else []
        restart = ResumableRun(
            adapter,
            pair.base_ids[rows],
            pair.n_prefix,
            memory_budget,
            read=[hook_name(value, layer) for value in values for layer in range(n_layers)],
        )
        source, ends[1, rows] = pair.read(rows, sites_read(site))
        base = restart.clean(measure)
        ends[0, rows] = base.float().cpu()
        where = pair.where[rows].to(adapter.device)
        for layer in range(n_layers):
            heads = chosen[layer].nonzero().flatten()
            if len(heads):
                single = torch.eye(n_heads, dtype=torch.bool)[heads].to(adapter.device)
                masks = single[:, None, None] & where[..., None]
                name, new = new_values(site, layer, restart.cache, source)
                found = restart.patched(layer, name, new, masks, measure) - base
                effects[:, rows, layer, heads] = found.permute(2, 1, 0).float().cpu()
            done(len(base))
    return effects, ends
