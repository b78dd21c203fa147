"""Cosine maps: gradients and activations of two sets of paragraphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import memcircuits as mc
from memcircuits.evidence.gradients.activations import loss_and_gradients
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from reproduction.charts import component_map
from reproduction.statistics import top_head
from reproduction.study import Finding, Outcome, Study, experiment, row
from reproduction.weights import cosine_mean

SITES = ("q", "k", "v", "z")


@experiment("Cosine similarity", "authors' notebook")
def cosine_maps(study: Study) -> Outcome:
    adapter, n = study.adapter, len(study.memorized)
    clean, corrupted = study.pairs
    gradients = cosine_similarity(
        *(mean_gradient_of_values(adapter, some) for some in (study.memorized, study.own)), dim=-1
    )
    of_sets = cosine_of_activations(adapter, study.memorized, study.control, ("z",))
    of_pairs = cosine_of_activations(adapter, clean, corrupted, SITES)
    rows: list[Finding] = [
        row("weights: memorized and controls, mean over components", "",
            cosine_mean(study.contrast), n, note="of the gradients of the mean NLL"),
        cosine_row("gradients of v: memorized and controls", gradients, n),
        cosine_row("z at the last prefix token: memorized and controls", of_sets["z"], n),
        *(
            cosine_row(f"{site} at the last prefix token: memorized and perturbed", of, len(clean))
            for site, of in of_pairs.items()
        ),
    ]  # fmt: skip
    own = "Controls have the model's own continuations, as in the authors' file."
    last = "Of the means over paragraphs, at the last token of the prefix (position 49)."
    charts = [
        component_map("Cosine of the gradients of weights", study.contrast.cosine, "cosine", ""),
        component_map("Cosine of the gradients of v", {"v": gradients}, "cosine", "", own),
        component_map(
            "Cosine of q, k, v, z, memorized and perturbed", of_pairs, "cosine", "", last
        ),
        component_map("Cosine of z, memorized and controls", of_sets, "cosine", "", last),
    ]
    return Outcome(rows, charts)


def cosine_row(what: str, values: Tensor, n: int) -> Finding:
    note = f"smallest {float(values.min()):.2f} in {top_head(-values)}"
    return row(f"{what}, mean over heads", "", float(values.mean()), n, note=note)


def mean_gradient_of_values(adapter: Adapter, paragraphs: mc.Paragraphs) -> Tensor:
    """dL/dv, mean over paragraphs and predicting positions, [layer, head, d_head]."""
    names = [hook_name("v", layer) for layer in range(adapter.n_layers)]
    first = paragraphs.n_given - 1
    total: list[Tensor] = []
    with adapter.preserving_state():
        for i in range(len(paragraphs)):
            _, gradients = loss_and_gradients(adapter, paragraphs, slice(i, i + 1), names)
            total.append(torch.stack([g[0, first:].float().mean(0).cpu() for g in gradients]))
    return torch.stack(total).mean(0)


def cosine_of_activations(
    adapter: Adapter, first: mc.Paragraphs, second: mc.Paragraphs, sites: Sequence[str]
) -> dict[str, Tensor]:
    """Site -> [layer, head]: cosine of the mean activations at the last prefix token."""
    means = [mean_activations(adapter, paragraphs, sites) for paragraphs in (first, second)]
    return {site: cosine_similarity(means[0][site], means[1][site], dim=-1) for site in sites}


def mean_activations(
    adapter: Adapter, paragraphs: mc.Paragraphs, sites: Sequence[str]
) -> dict[str, Tensor]:
    """Site -> [layer, head, d_head], mean over paragraphs at the last prefix token."""
    names = {site: [hook_name(site, layer) for layer in range(adapter.n_layers)] for site in sites}
    every = [name for of_site in names.values() for name in of_site]
    sums = dict.fromkeys(every, torch.zeros(()))
    with adapter.preserving_state():
        for ids in paragraphs.inputs[:, : paragraphs.n_given].split(1):
            cache = adapter.run(ids, positions=slice(-1, None), read=every).cache
            for name in every:
                sums[name] = sums[name] + cache[name][0, -1].float().cpu()
    return {
        site: torch.stack([sums[name] for name in of_site]) / len(paragraphs)
        for site, of_site in names.items()
    }
