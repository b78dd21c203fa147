"""Activation patching between memorized paragraphs and their corrupted versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.evidence.patching.attribution import effects_by_position
from memcircuits.evidence.patching.context import PatchingContext
from memcircuits.evidence.patching.results import PatchMap
from memcircuits.evidence.patching.sites import PatchHeadSite
from memcircuits.evidence.patching.sweeps import attribution_patching, patch_layers
from memcircuits.models.hooks import HEAD_SITES
from reproduction.charts import Chart, bars, component_map, heatmap
from reproduction.statistics import mean, top_head
from reproduction.study import CHECKED, Outcome, Study, experiment, row

METRIC = "first_impacted"
FEW, SOME = slice(0, 4), slice(0, 16)  # pairs of the sweeps over positions, and over layers
DIRECTIONS = {
    "perturbed into memorized": "the paper's first direction: does the recitation need it?",
    "memorized into perturbed": (
        "the paper's second direction: measured on the perturbed text's own first impacted token"
    ),
    "memorized into perturbed, memorized token": (
        "ours: does the activation restore the memorized token?"
    ),
}


@experiment("Activation patching", "appendix")
def patching(study: Study) -> Outcome:
    rows, charts = [], []
    for direction, definition in DIRECTIONS.items():
        results = patched(study, direction)
        maps = {site: result.values for site, result in results.items()}
        for site, result in results.items():
            # Attribution: the best of the heads that were measured exactly, as far as it is known.
            best = top_head(result.exact.abs() if result.exact.numel() else result.values.abs())
            note = f"{100 * float(result.share[best]):.0f} % of the difference between the runs"
            if result.exact.numel():
                note += (
                    f"; estimated to first order, exactly {float(result.exact[best]):.3g}, "
                    f"correlation {result.agreement['all']:.2f}"
                )
            effects = result.samples[METRIC][:, best.layer, best.head]
            what = f"{direction}, {site} at the perturbed token: best head {best}"
            rows.append(row(what, "", mean(effects), len(effects), "nats", note))
        title = f"Patching at the perturbed token: {direction}"
        charts.append(component_map(title, maps, "effect", "nats", definition.capitalize() + "."))
    return Outcome(rows, charts)


def patched(study: Study, direction: str) -> dict[PatchHeadSite, PatchMap]:
    """Heads patched at the perturbed token, in one of `DIRECTIONS`; site -> effects."""
    clean, corrupted = study.pairs
    if direction == "memorized into perturbed":
        clean, corrupted = corrupted, clean
    options: dict[str, Any] = {
        "positions": "changed",
        "metric": METRIC,
        "direction": "denoising" if direction.endswith("memorized token") else "noising",
        "seed": study.seed,
        **study.options,
    }
    if study.patching == "attribution":
        options |= {"sites": HEAD_SITES, "check": CHECKED}
        return attribution_patching(study.model, clean, corrupted, **options)
    return {
        site: mc.patch_heads(study.model, clean, corrupted, site=site, **options)
        for site in HEAD_SITES
    }


@experiment("Patching of layers", "appendix")
def layer_patching(study: Study) -> Outcome:
    clean, corrupted = study.pairs.clean[FEW], study.pairs.corrupted[FEW]
    result = patch_layers(study.model, clean, corrupted, metric=METRIC, **study.options)
    effects = result.samples[METRIC]  # [pair, layer, pos]
    at_token = effects[torch.arange(len(clean)), :, torch.tensor(corrupted.metadata["position"])]
    below = ((at_token / at_token[:, :1]).mean(0) < 0.5).nonzero()
    layer = f"layer {int(below[0])}" if len(below) else "none"
    what = "layer at which the residual stream of the perturbed token carries less than half"
    note = "of what it carries below the first layer, on the first impacted token"
    rows = [row(what, "", layer, len(clean), note=note)]
    title = f"Residual stream by layer and position: {clean.names[0]}"
    charts = [heatmap(title, effects[0], "effect", "nats", col_label="position")]
    points = []
    for site in ("attn_out", "mlp_out"):
        values = layer_outputs(study, site)
        best = int(values.mean(0).abs().argmax())
        what = f"{site} at the perturbed token: layer with the largest effect, layer {best}"
        rows.append(row(what, "", mean(values[:, best]), len(values), "nats"))
        points += [
            {"layer": layer, "effect": float(effect), "site": site}
            for layer, effect in enumerate(values.mean(0))
        ]
    title = "Outputs of attention and MLP at the perturbed token"
    labels = {"by": "site", "units": "nats", "note": "Perturbed into memorized, as in the paper."}
    charts.append(bars(title, points, "layer", "effect", **labels))
    return Outcome(rows, charts)


def layer_outputs(study: Study, site: Any) -> Tensor:
    """Effect of one layer's output at the perturbed token, [pair, layer], nats."""
    clean, corrupted = study.pairs
    effects = []
    for i, position in enumerate(corrupted.metadata["position"][SOME]):
        options = {"site": site, "positions": [position], "metric": METRIC, **study.options}
        result = patch_layers(study.model, clean[i], corrupted[i], **options)
        effects.append(result.samples[METRIC][0, :, 0])
    return torch.stack(effects)


@experiment("Patching of positions", "appendix")
def position_patching(study: Study) -> Outcome:
    effects = head_by_position(study)
    best = top_head(effects.abs().amax(-1))
    position = int(effects[best].abs().argmax())
    what = f"q of a head at a prefix position: largest effect, {best} at position {position}"
    n = len(study.pairs.clean[FEW])
    note = "first-order estimate" if study.patching == "attribution" else ""
    rows = [row(what, "", float(effects[best][position]), n, "nats", note)]
    chart: Chart = heatmap(
        f"Queries of the heads of layer {best.layer} at each position of the prefix",
        effects[best.layer],
        "effect",
        "nats",
        row_label="head",
        col_label="position",
        note="Perturbed into memorized, mean over pairs; the layer with the largest effect.",
    )
    return Outcome(rows, [chart])


def head_by_position(study: Study) -> Tensor:
    """Effect of each head's queries at each prefix position, [layer, head, pos]."""
    clean, corrupted = study.pairs.clean[FEW], study.pairs.corrupted[FEW]
    adapter, n_prefix = study.adapter, clean.n_prefix
    if study.patching == "attribution":
        context = PatchingContext.of(study.model, clean, corrupted, METRIC, "noising", None)
        with adapter.preserving_state():
            by_position = effects_by_position(
                context.with_chosen_metric_only(), "q", study.memory_budget
            )
        return by_position[:, :, :n_prefix].mean(0).transpose(1, 2)
    effects = torch.zeros(adapter.n_layers, adapter.n_heads, n_prefix)
    # Before the first perturbed token both runs are the same, and no patch has an effect.
    for position in range(min(corrupted.metadata["position"]), n_prefix):
        effects[..., position] = mc.patch_heads(
            study.model,
            clean,
            corrupted,
            site="q",
            positions=[position],
            metric=METRIC,
            **study.options,
        ).values
    return effects
