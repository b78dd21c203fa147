"""Attribution patching: the effects of all heads from two forward passes and one backward pass.

AtP* (Kramar et al. 2024, arXiv 2403.00745). Every head site acts on the rest of the model through
its head's z, so to first order an effect is the gradient of the metric in z times the change of z.
For q and k that change is recomputed through the softmax, in one run of each block by itself: a
saturated softmax has no gradient but may change a lot. What stays first-order is everything above
z; how good that is, some heads measured exactly must tell (`memcircuits.evidence.patching.sweeps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.evidence.patching.pairs import GROUP, Pair, new_values, sites_read
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.batching import rows_that_fit
from memcircuits.models.hooks import hook_name


def attribute(
    pair: Pair, site: str, memory_budget: int | None, done: Callable[[int], None]
) -> tuple[Float[Tensor, "metric batch layer head"], Float[Tensor, "end batch metric"]]:
    """First-order effects of all heads on the chosen metric; metrics of both runs."""
    adapter = pair.adapter
    layers = range(adapter.n_layers)
    n_pos, n_logits = pair.base_ids.shape[1], pair.clean.n_continuation
    fit = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    parts, ends = [], []
    for rows in pair.groups(min(GROUP, fit)):
        source, end = pair.read(rows, sites_read(site))
        base, start, gradients = _z_gradients(pair, rows)
        ends.append(torch.stack([start, end]))
        where = pair.where[rows].to(adapter.device)[..., None, None]
        columns = []
        for layer in layers:
            name, new = new_values(site, layer, base, source)
            z = base[hook_name("z", layer)]
            if name == hook_name("z", layer):
                changed = torch.where(where, new, z)
            else:
                changed = _recomputed_z(pair, rows, layer, base, name, new, where)
            effect = (gradients[layer] * (changed - z)).float().sum((1, 3))
            columns.append(effect)
        heads = torch.stack(columns, 1)
        if site in ("k", "v"):  # a key-value head acts through all heads of its group
            heads = heads.unflatten(-1, (adapter.n_kv_heads, -1)).sum(-1)
        parts.append(heads.cpu())
        done(len(heads) * adapter.n_layers)
    return torch.cat(parts)[None], torch.cat(ends, 1)


def _z_gradients(
    pair: Pair, group: slice
) -> tuple[dict[str, Tensor], Float[Tensor, "batch metric"], tuple[Tensor, ...]]:
    """Run the base: what it computes, its metrics, and the gradient of the first one in z."""
    adapter = pair.adapter
    tokens = pair.base_ids[group, :-1]
    layers = range(adapter.n_layers)
    size = (*tokens.shape, adapter.n_heads, adapter.d_head)
    # z plus zero: its gradient is that of z, and no parameter is involved.
    zeros = [
        torch.zeros(size, dtype=adapter.dtype, device=adapter.device, requires_grad=True)
        for _ in layers
    ]

    def plus(zero: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: z + zero

    sites = [
        site
        for i in layers
        for site in (hook_name("z", i), hook_name("v", i), hook_name("resid_pre", i))
    ]
    with torch.enable_grad():
        run = run_to_continuation(
            adapter,
            pair.base_ids[group],
            pair.n_prefix,
            read=sites,
            edit={hook_name("z", i): plus(zeros[i]) for i in layers},
        )
        rows = torch.arange(len(tokens), device=adapter.device)
        metrics = pair.measure(group)(run.logits, rows)
        gradients = torch.autograd.grad(metrics[:, 0].sum(), zeros)
    cache = {name: tensor.detach() for name, tensor in run.cache.items()}
    return cache, metrics.detach().float().cpu(), gradients


def _recomputed_z(
    pair: Pair,
    group: slice,
    layer: int,
    base: Mapping[str, Tensor],
    name: str,
    new: Tensor,
    where: Bool[Tensor, "batch pos 1 1"],
) -> Float[Tensor, "batch pos head d_head"]:
    """The z of every head when q, k or v of all is replaced: one block, run by itself."""
    kept: list[Tensor] = []

    def replace(old: Tensor) -> Tensor:
        return torch.where(where, new, old)

    def keep(z: Tensor) -> Tensor:
        kept.append(z)
        return z

    edit = {name: replace, hook_name("z", layer): keep}
    if pair.adapter.supports_partial_forward:
        pair.adapter.run_blocks(layer, base[hook_name("resid_pre", layer)], layer + 1, edit=edit)
    else:
        pair.adapter.run(pair.base_ids[group, :-1], positions=slice(-1, None), edit=edit)
    return kept[0]


def heads_to_check(
    estimate: Float[Tensor, "layer head"], check: int, seed: int
) -> tuple[Bool[Tensor, "layer head"], Bool[Tensor, "layer head"]]:
    """The heads with the largest estimates, and others drawn at random."""
    flat = estimate.abs().flatten()
    largest = flat.argsort(descending=True, stable=True)
    top, rest = largest[: check // 2], largest[check // 2 :]
    generator = torch.Generator().manual_seed(seed)
    drawn = rest[torch.randperm(len(rest), generator=generator)[: check - check // 2]]
    masks = torch.zeros(2, flat.numel(), dtype=torch.bool)
    masks[0, top], masks[1, drawn] = True, True
    return masks[0].view(estimate.shape), masks[1].view(estimate.shape)


def correlation(a: Float[Tensor, " head"], b: Float[Tensor, " head"]) -> float:
    """Pearson's r; NaN for fewer than two heads or constant values."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
