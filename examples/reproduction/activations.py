"""Gradients of activations: over the continuation, and at two tokens of perturbed paragraphs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.data.token_text import token_labels
from memcircuits.evidence.gradients.activations import GRADIENT_SITES
from memcircuits.models.hooks import HEAD_SITES
from reproduction.charts import Chart, component_map, heatmap
from reproduction.statistics import agreeing, intervals, lower_half, split, top_head
from reproduction.study import Finding, Outcome, Study, experiment, row

UNITS = "nats/token per unit of activation"
PLACES = ("perturbed token", "first impacted token")


@experiment("Activation gradients", "figure 10")
def activation_gradients(study: Study) -> Outcome:
    rows: list[Finding] = []
    charts: list[Chart] = []
    sets = {"memorized": study.memorized, "controls": study.own}
    for name, paragraphs in sets.items():
        folds = [(len(fold), continuation_map(study, fold)) for fold in split(paragraphs)]
        n = len(paragraphs)
        values = {
            site: torch.stack([size * of[site] for size, of in folds]).sum(0) / n
            for site in folds[0][1]
        }
        for site in values:
            parts = torch.stack([size * of[site].sum(1) for size, of in folds])
            without = [[lower_half(parts.sum(0) - part)] for part in parts]
            (share,) = intervals([lower_half(parts.sum(0))], without)
            what = f"share of the lower half of the layers in |dL/d{site}|, {name}"
            rows.append(row(what, "", share, n, "%"))
        note = (
            "The paper's definition: the largest over the hidden dimension, then the mean over the "
            "positions that predict the continuation (49 to 98 of 100). Each paragraph has its own "
            "loss here; the paper's gradients are smaller by the number of paragraphs. "
        )
        if name == "controls":
            note += "Controls have the model's own continuations, as in the authors' file."
        title = f"|dL/dh| of the activations, {name}"
        charts.append(component_map(title, values, "gradient", UNITS, note))
    return Outcome(rows, charts)


def continuation_map(study: Study, paragraphs: mc.Paragraphs) -> dict[str, Tensor]:
    """Site -> [layer, head], mean over the positions that predict the continuation."""
    values = mc.activation_gradients(study.model, paragraphs, **study.options).values
    return {site: of[..., paragraphs.n_prefix - 1 :].mean(-1) for site, of in values.items()}


@experiment("Activation gradients of perturbed paragraphs", "figure 6")
def perturbed_gradients(study: Study) -> Outcome:
    clean, corrupted = study.pairs
    rows: list[Finding] = []
    charts: list[Chart] = []
    for text, paragraphs in {"memorized": clean, "perturbed": corrupted}.items():
        places = at_two_places(study, paragraphs, corrupted)
        for place, samples in places.items():
            means = {site: values.mean(0) for site, values in samples.items()}
            for site in HEAD_SITES:
                best = top_head(means[site])
                share, low, high = agreeing([top_head(v) for v in samples[site]], best)
                note = f"the largest in {share:.0f} % of the pairs"
                note += "" if low is None else f" ({low:.0f} to {high:.0f})"
                what = f"head with the largest |dL/d{site}| at the {place}, {text}"
                rows.append(row(what, "", str(best), len(clean), note=note))
            note = (
                "L is the NLL of the first token that the perturbation changes, in the text's own "
                f"version; the paper's definition, at the {place}"
            )
            note += " (where it is predicted)." if place == PLACES[1] else "."
            title = f"|dL/dh| at the {place}, {text}"
            charts.append(component_map(title, means, "gradient", "nats per unit", note))
    charts.append(token_map(study))
    return Outcome(rows, charts)


def at_two_places(
    study: Study, paragraphs: mc.Paragraphs, corrupted: mc.Paragraphs
) -> dict[str, dict[str, Tensor]]:
    """Place -> site -> [pair, layer, head], of the NLL of the first impacted token.

    The places are the perturbed token and the position that predicts the first impacted one.
    """
    samples: dict[str, dict[str, list[Tensor]]] = {
        place: {site: [] for site in GRADIENT_SITES} for place in PLACES
    }
    for i, paragraph in enumerate(paragraphs):
        position, token = (corrupted.metadata[key][i] for key in ("position", "first_impacted"))
        values = mc.activation_gradients(
            study.model, paragraph, token=token, **study.options
        ).values
        predicting = paragraphs.n_prefix - 1 + token
        for place, at in zip(PLACES, (position, predicting), strict=True):
            for site, of in values.items():
                samples[place][site].append(of[:, :, at])
    return {place: stacked(of) for place, of in samples.items()}


def stacked(samples: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {site: torch.stack(each) for site, each in samples.items()}


def token_map(study: Study) -> Chart:
    """Layer x token, of the values of the head with the largest one, on the first paragraph."""
    paragraph = study.memorized[0]
    result = mc.activation_gradients(study.model, paragraph, sites=("v",), **study.options)
    values = result.values["v"]
    head = int(values.amax((0, 2)).argmax())
    labels = token_labels(paragraph.ids[0, :-1].tolist(), study.model)
    return heatmap(
        f"|dL/dv| of head {head} of each layer at each token: {paragraph.names[0]}",
        values[:, head],
        "gradient",
        UNITS,
        col_label="token",
        col_names=[f"{i} {label}" for i, label in enumerate(labels)],
        note="L is the mean NLL of the continuation, as in the authors' notebook.",
    )
