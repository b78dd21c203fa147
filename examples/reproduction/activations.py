"""Experiments on activations: gradients, patching, attention to rare tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.rare_tokens import RareTokenAttention
from memcircuits.models.hooks import HEAD_SITES, hook_name
from reproduction.statistics import agreeing, intervals, lower_half, mean, split, top_head
from reproduction.study import CHECKED, Outcome, Study, experiment, heatmap, is_papers, row


@experiment("Activation gradients", "figures 6 and 10")
def activation_gradients(study: Study) -> Outcome:
    outcome, charts = [], []
    for name, paragraphs in {"memorized": study.memorized, "controls": study.control}.items():
        folds = [
            (len(fold), mc.activation_gradients(study.model, fold, **study.options).values)
            for fold in split(paragraphs)
        ]
        for site in folds[0][1]:
            parts = torch.stack([n * values[site].sum((1, 2)) for n, values in folds])
            rest = [[lower_half(parts.sum(0) - part)] for part in parts]
            (value,) = intervals([lower_half(parts.sum(0))], rest if len(rest) > 1 else [])
            what = f"share of the lower half of the layers in |dL/d{site}|, {name}"
            outcome.append(row(what, "", value, len(paragraphs), "%"))
    clean, corrupted = study.pairs
    at_token: dict[str, list[Tensor]] = {}
    for i, pair in enumerate(clean):
        position, token = (corrupted.metadata[key][i] for key in ("position", "first_impacted"))
        result = mc.activation_gradients(
            study.model, pair, sites=HEAD_SITES, token=token, **study.options
        )
        for site, values in result.values.items():
            at_token.setdefault(site, []).append(values[:, :, position])
    for site, each in at_token.items():
        heads = torch.stack(each).mean(0)
        best = top_head(heads)
        share, low, high = agreeing([top_head(values) for values in each], best)
        note = f"the largest in {share:.0f} % of the pairs"
        note += "" if low is None else f" ({low:.0f} to {high:.0f})"
        what = f"head with the largest |dL/d{site}| at the perturbed token"
        outcome.append(
            row(what, "", str(best), len(each), note=f"{note}; L of the first wrong one")
        )
        title = f"|dL/d{site}| at the perturbed token"
        charts.append(heatmap(title, heads, "gradient", "nats per unit", best))
    return Outcome(outcome, charts)


@experiment("Activation patching", "appendix")
def patching(study: Study) -> Outcome:
    clean, corrupted = study.pairs
    outcome, charts = [], []
    for direction in ("noising", "denoising"):
        for site in HEAD_SITES:
            result = mc.patch_heads(
                study.model,
                clean,
                corrupted,
                site=site,
                positions="changed",
                metric="first_impacted",
                direction=direction,
                method=study.patching,
                check=CHECKED,
                seed=study.seed,
                **study.options,
            )
            # Attribution: the best of the heads that were measured exactly, as far as it is known.
            best = top_head(result.exact.abs() if result.exact.numel() else result.values.abs())
            note = f"{100 * float(result.share[best]):.0f} % of the difference between the runs"
            if result.exact.numel():
                note += (
                    f"; estimated to first order, exactly {float(result.exact[best]):.3g}, "
                    f"correlation {result.agreement['all']:.2f}"
                )
            value = mean(result.samples["first_impacted"][:, best.layer, best.head])
            what = f"{direction}, {site} at the perturbed token: best head {best}"
            outcome.append(row(what, "", value, len(clean), "nats", note))
            if site == "v":  # what others read from the perturbed token
                title = f"{direction.capitalize()} v of each head at the perturbed token"
                charts.append(heatmap(title, result.values, "effect", "nats"))
    return Outcome(outcome, charts)


@experiment("Patching of layers", "appendix")
def layer_patching(study: Study) -> Outcome:
    few = slice(0, 4)
    clean, corrupted = study.pairs.clean[few], study.pairs.corrupted[few]
    result = patch_layers(study.model, clean, corrupted, metric="first_impacted", **study.options)
    effects = result.samples["first_impacted"]  # [pair, layer, pos]
    at_token = effects[torch.arange(len(clean)), :, torch.tensor(corrupted.metadata["position"])]
    below = ((at_token / at_token[:, :1]).mean(0) < 0.5).nonzero()
    layer = f"layer {int(below[0])}" if len(below) else "none"
    what = "layer at which the residual stream of the perturbed token carries less than half"
    note = "of what it carries below the first layer, on the first wrong token; noising"
    title = f"Residual stream by layer and position: {clean.names[0]}"
    kind, chart = heatmap(title, effects[0], "effect", "nats")
    rows = [row(what, "", layer, len(clean), note=note)]
    return Outcome(rows, [(kind, chart | {"col_label": "position"})])


@experiment("Attention to rare tokens", "figures 6 and 7")
def rare_tokens(study: Study) -> Outcome:
    result = study.rare
    best = top_head(-result.values)
    n, papers = len(result.attention), is_papers(study)
    rows = []
    for head in sorted({best} | ({mc.Head(1, 2)} if papers else set())):
        ours, null = aggregated(result, head, study.seed)
        what = f"correlation of frequency rank and attention summed per rank, {head}"
        note = (
            f"as the paper aggregates; with counts permuted within paragraphs {null:.2f}: high "
            "ranks are often empty"
        )
        printed = "-0.97" if papers and head == (1, 2) else "-0.97 (L1H2)"
        rows.append(row(what, printed, ours, n, note=note))
    value = mean(result.samples["tau"][:, best.layer, best.head])
    what = f"attention and count within a paragraph, {best}, the most negative head"
    note = f"p = {float(result.p_value[best]):.2g} against counts permuted within paragraphs"
    note = "; ".join((note, *result.notes))
    rows.append(row(what, "", value, n, "tau-b", note))
    note = f"mean over all heads {float(result.entropy.mean()):.2f}"
    what = f"entropy of the attention of {best} to the prefix"
    rows.append(row(what, "", float(result.entropy[best]), n, "nats", note))
    title = "Attention to common (+) or rare (-) tokens"
    return Outcome(rows, [heatmap(title, result.values, "tau-b", "", best)])


def aggregated(result: RareTokenAttention, head: mc.Head, seed: int) -> tuple[float, float]:
    """The paper's way: attention summed per dense rank over all paragraphs, and its correlation.

    Returns:
        Pearson's correlation with the rank, and its mean with counts permuted in each paragraph.
    """
    attention = result.attention[:, head.layer, head.head]
    ranks = torch.stack([row.unique(return_inverse=True)[1] for row in result.counts])

    def correlation(attention: Tensor) -> float:
        sums = torch.zeros(int(ranks.max()) + 1).scatter_add_(
            0, ranks.flatten(), attention.flatten()
        )
        pair = torch.stack([torch.arange(len(sums), dtype=torch.float32), sums])
        return float(torch.corrcoef(pair)[0, 1])

    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(attention.shape, generator=generator).argsort(-1) for _ in range(100)]
    null = [correlation(attention.gather(1, order)) for order in orders]
    return correlation(attention), math.fsum(null) / len(null)


def activation_cosine(study: Study) -> Tensor:
    """Cosine of the mean z of memorized and control paragraphs, [layer, head]."""
    adapter = study.adapter
    names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    means = []
    with adapter.preserving_state():
        for paragraphs in (study.memorized, study.control):
            total: Tensor | float = 0.0
            for paragraph in paragraphs:
                run = adapter.run(paragraph.ids[:, :-1], positions=slice(-1, None), read=names)
                total = total + torch.stack([run.cache[name][0].float().cpu() for name in names])
            means.append(torch.as_tensor(total).transpose(1, 2).flatten(2))  # [layer, head, rest]
    return torch.nn.functional.cosine_similarity(*means, dim=-1)
