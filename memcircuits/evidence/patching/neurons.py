"""Patching of neurons in groups: which neurons of a layer carry the difference between two prompts?

A layer has thousands of neurons, so they are patched in groups of equal size. They are ordered by
how much what they write differs between the two runs, mean |a - a'| |w_out| over the pairs and the
patched positions: group 0 of a layer holds the neurons that differ most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import at_least
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_mean
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.activation_edits import RowsEdit
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.evidence.patching.context import (
    MAX_PAIRS_HELD,
    Direction,
    PatchEffects,
    PatchingContext,
    Positions,
)
from memcircuits.evidence.patching.metrics import METRIC_UNITS, CustomMetric, MetricName
from memcircuits.evidence.patching.results import PatchMap
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Model
from memcircuits.models.hooks import hook_name


@plain_torch()
def patch_neurons(  # noqa: PLR0913
    model: Model,
    clean: ParagraphsLike,
    corrupted: ParagraphsLike,
    *,
    groups: int = 8,
    positions: Positions = None,
    metric: MetricName | CustomMetric = "nll",
    direction: Direction = "noising",
    memory_budget: int | None = None,
    progress: bool = True,
) -> PatchMap:
    """Patch each group of neurons of each layer by itself. Always exact.

    Args:
        model: the model.
        clean: as in `memcircuits.patch_heads`.
        corrupted: as in `memcircuits.patch_heads`.
        groups: number of groups in each layer, of equal size, those that differ most first.
        positions: where to patch: None for everywhere, `changed` for the prefix tokens that differ,
            or a list.
        metric: as in `memcircuits.patch_heads`.
        direction: `noising` or `denoising`.
        memory_budget: maximum bytes per batch; by default a third of the free memory.
        progress: show a bar on stderr.

    Returns:
        A `PatchMap` whose second axis is the group, with `samples` per pair.

    Raises:
        InputError: as `memcircuits.patch_heads`.

    Example:
        >>> corrupted = memorized.ids[:1].clone()
        >>> corrupted[0, 49] = 7  # another last token of the prefix
        >>> effect = patch_neurons(model, memorized[:1], corrupted, groups=4, progress=False)
        >>> effect.values.shape  # layer, group
        torch.Size([6, 4])
    """
    at_least("groups", groups, 1)
    context = PatchingContext.of(model, clean, corrupted, metric, direction, positions)
    adapter = context.adapter
    with adapter.preserving_state():
        members = [order.tensor_split(min(groups, len(order))) for order in _orders(context)]
        with bar(
            len(context) * adapter.n_layers, "patch neurons", unit="layer", progress=progress
        ) as progress_bar:
            effects = _effects(context, members, memory_budget, progress_bar.update)
    names, values = context.metric_names, effects.masked()
    return PatchMap(
        name=f"{direction} neurons: {names[0]}",
        units=METRIC_UNITS.get(names[0], ""),
        values=finite_mean(values[0]),
        provenance=context.provenance(site="post", groups=groups),
        samples=dict(zip(names, values, strict=True)),
        notes=context.notes(values[0]),
        axis="neuron_group",
        base=dict(zip(names, effects.base_metrics.T, strict=True)),
        source=dict(zip(names, effects.source_metrics.T, strict=True)),
    )


def _orders(context: PatchingContext) -> list[Int[Tensor, " neuron"]]:
    """The neurons of each layer, those whose output differs most between the runs first."""
    adapter = context.adapter
    layers = range(adapter.n_layers)
    sizes = [torch.zeros((), device=adapter.device) for _ in layers]
    for group in context.groups(MAX_PAIRS_HELD):
        base, source = (_post(context, p, group) for p in (context.base, context.source))
        patched = context.patched[group].to(adapter.device)[..., None]
        for layer in layers:
            difference = (base[layer] - source[layer]).abs() * patched
            sizes[layer] = sizes[layer] + difference.float().sum((0, 1))
    norms = [adapter.weight(layer, "W_out").values[0].float().norm(dim=-1) for layer in layers]
    return [
        (size * norm.to(size.device)).argsort(descending=True, stable=True)
        for size, norm in zip(sizes, norms, strict=True)
    ]


def _post(
    context: PatchingContext, paragraphs: Paragraphs, group: slice
) -> list[Float[Tensor, "batch pos neuron"]]:
    """The activations of all neurons, layer by layer."""
    names = [hook_name("post", layer) for layer in range(context.adapter.n_layers)]
    cache = run_to_continuation(context.adapter, paragraphs, group, read=names).cache
    shape = paragraphs.inputs[group, :-1].shape
    # Some models hand their MLPs all positions in one axis.
    return [cache[name].view(*shape, -1) for name in names]


def _effects(
    context: PatchingContext,
    members: list[tuple[Tensor, ...]],
    memory_budget: int | None,
    done: Callable[[int], object],
) -> PatchEffects:
    """Effect of each group of neurons."""
    adapter = context.adapter
    n_metrics, n_pairs = len(context.metric_names), len(context)
    effects = PatchEffects(
        values=torch.full((n_metrics, n_pairs, adapter.n_layers, len(members[0])), torch.nan),
        base_metrics=torch.empty(n_pairs, n_metrics),
        source_metrics=torch.empty(n_pairs, n_metrics),
    )
    for group in context.groups(MAX_PAIRS_HELD):
        metrics = context.metrics(group)
        run = ResumableRun(adapter, context.base[group], memory_budget)
        _, effects.source_metrics[group] = context.run_source(group, ())
        source = _post(context, context.source, group)
        base = run.clean(metrics)
        effects.base_metrics[group] = base.float().cpu()
        patched = context.patched[group].to(adapter.device)
        for layer, of_layer in enumerate(members):
            for index, neurons in enumerate(of_layer):
                edit = {hook_name("post", layer): _patch(source[layer], patched, neurons)}
                change = run.hooked(layer, edit, metrics) - base
                effects.values[:, group, layer, index] = change.T.float().cpu()
            done(len(base))
    return effects


def _patch(
    source: Float[Tensor, "batch pos neuron"],
    patched: Bool[Tensor, "batch pos"],
    neurons: Int[Tensor, " neuron"],
) -> RowsEdit:
    def replace(activation: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
        post = activation.view(len(rows), -1, activation.shape[-1]).clone()
        new = torch.where(
            patched[rows][..., None], source[rows][..., neurons].to(post.dtype), post[..., neurons]
        )
        post[..., neurons] = new
        return post.view(activation.shape)

    return replace
