"""Experiments on gradients of weights: maps, statistics and the contrastive objectives."""

from __future__ import annotations

from typing import Any

import torch

import memcircuits as mc
from memcircuits.evidence.gradients.parameters import ParameterGradients
from reproduction.charts import Chart, bars, component_map
from reproduction.statistics import agreeing, lower_half, per_head, top_head
from reproduction.study import Finding, Outcome, Study, experiment, row

PRINTED = {
    "0-10": ("53.01", "29"),
    "11-29": ("27.14", "40"),
    "30-49": ("14.30", "54"),
    "50": ("9.71", "59"),
}
OWN = "0-10, own continuations"  # as in the authors' file of this bucket


@experiment("Parameter gradients", "figure 4")
def gradients(study: Study) -> Outcome:
    results = bucket_gradients(study)
    rows: list[Finding] = []
    for bucket in (*PRINTED, OWN):
        rows += gradient_rows(study, bucket, results.get(bucket))
    rows += other_basis_rows(study)
    charts = [
        component_map(
            f"Largest |gradient| of each component, EM {bucket}",
            result.values,
            "gradient",
            result.units,
            "The paper's definition: of the mean loss over the paragraphs, the largest over the "
            "weights of a head or of an MLP matrix.",
        )
        for bucket, result in results.items()
    ]
    points = [
        {"layer": layer, "share": float(share), "EM": f"EM {bucket}"}
        for bucket, result in results.items()
        for layer, share in enumerate(100 * result.layers / result.layers.sum())
    ]
    labels = {"by": "EM", "y_label": "share of the gradient", "units": "%"}
    charts.append(bars("Gradient by layer", points, "layer", "share", **labels))
    return Outcome(rows, charts)


def bucket_gradients(study: Study) -> dict[str, ParameterGradients]:
    """Gradients of each of the paper's sets that there is; measured once."""
    results = {}
    for bucket in (*PRINTED, OWN):
        paragraphs = study.bucket(bucket)
        if paragraphs is not None:
            results[bucket] = study.kept(
                ParameterGradients,
                f"gradients-{bucket.replace(', ', '-').replace(' ', '-')}",
                lambda some=paragraphs: mc.parameter_gradients(study.model, some, **study.options),
            )
    return results


def gradient_rows(study: Study, bucket: str, result: ParameterGradients | None) -> list[Finding]:
    """The sum over all components and the share of the lower half of the layers."""
    total, share = PRINTED[bucket.partition(",")[0]]
    paragraphs = study.bucket(bucket)
    n = 0 if paragraphs is None else len(paragraphs)
    values: list[Any] = [None, None]
    notes = ["no such paragraph"] * 2
    if result is not None:
        values = [float(result.layers.sum()), 100 * result.layer_share()]
        told = "the scale differs between sets; the share does not depend on it"
        notes = [f"{told}; no interval: it is a maximum over the batch", ""]
    return [
        row(f"sum of the largest |gradient|, EM {bucket}", total, values[0], n, "", notes[0]),
        row(f"share of the lower half of layers, EM {bucket}", share, values[1], n, "%", notes[1]),
    ]


def other_basis_rows(study: Study) -> list[Finding]:
    """The same numbers in the basis that the page is not made in."""
    if study.other_model is None:
        return []
    basis = "raw" if study.adapter.basis == "folded" else "folded"
    try:
        model = study.other_model()
    except mc.InputError as error:  # not every architecture can be folded
        what = f"sum of the largest |gradient|, {basis} weights"
        return [row(what, "", None, 0, note=str(error))]
    rows = []
    for bucket in ("0-10", "50"):
        paragraphs = study.bucket(bucket)
        if paragraphs is None:
            continue
        layers = mc.parameter_gradients(model, paragraphs, **study.options).layers
        n, where = len(paragraphs), f"EM {bucket}, {basis} weights"
        rows += [
            row(f"sum of the largest |gradient|, {where}", "", float(layers.sum()), n),
            row(f"share of the lower half of layers, {where}", "", lower_half(layers), n, "%"),
        ]
    return rows


@experiment("Statistics of gradients", "figure 9")
def gradient_statistics(study: Study) -> Outcome:
    results = bucket_gradients(study)
    charts: list[Chart] = []
    rows = []
    frames = {bucket: result.component_statistics() for bucket, result in results.items()}
    for bucket, frame in frames.items():
        n = len(study.bucket(bucket) or ())
        for name in ("sum", "variance", "max", "min"):
            value = frame[name].max() if name != "min" else frame[name].min()
            component = frame["component"][frame[name].tolist().index(value)]
            note = f"{component}, the component with the most extreme one"
            rows.append(row(f"{name} of the gradient, EM {bucket}", "", float(value), n, note=note))
    titles = {"sum": "Sum of |g|", "variance": "Variance of g", "max": "Largest g"}
    for name, title in (titles | {"min": "Smallest g, without its sign"}).items():
        points = [
            {"component": r["component"], "value": abs(r[name]), "EM": f"EM {bucket}"}
            for bucket, frame in frames.items()
            for r in frame.to_dict("records")
        ]
        labels = {
            "by": "EM",
            "note": "Over all layers, as in the paper, whose axis is logarithmic.",
        }
        charts.append(bars(title, points, "component", "value", **labels))
    for part in ("attention", "MLP"):
        points = [
            {**r, "EM": f"EM {bucket}"}
            for bucket, result in results.items()
            for r in result.layer_sums().to_dict("records")
            if r["part"] == part
        ]
        charts.append(bars(f"Sum of |g| by layer, {part}", points, "layer", "sum", by="EM"))
    return Outcome(rows, charts)


@experiment("Contrastive gradients", "equation 3")
def contrast(study: Study) -> Outcome:
    result, n_heads = study.contrast, study.adapter.n_heads
    heads = result.per_head(n_heads)
    best = top_head(heads)
    n = len(study.memorized)
    each = [top_head(per_head(result.samples, i, n_heads)) for i in range(n)]
    told = "at the original weights the KL term has no gradient: this is the NLL's alone"
    rows = [
        row("head with the largest gradient, unlearning", "L1H2", str(best), n, note=told),
        row("paragraphs whose own largest is that head", "", agreeing(each, best), n, "%"),
    ]
    charts = [
        component_map(
            "Unlearning: largest |gradient| of each component",
            result.values,
            "gradient",
            result.units,
            "Mean over paragraphs, each with its own gradient (the paper sets one paragraph "
            "against ten controls).",
        )
    ]
    corrupted = study.pairs.corrupted
    editing = mc.parameter_gradients(study.model, corrupted, average="paragraph", **study.options)
    best = top_head(editing.per_head(n_heads))
    told = "+NLL of the perturbed paragraphs; again the KL term has no gradient"
    rows.append(
        row("head with the largest gradient, editing", "", str(best), len(corrupted), note=told)
    )
    title = "Editing: largest |gradient| of each component"
    charts.append(component_map(title, editing.values, "gradient", editing.units, told))
    return Outcome(rows, charts)


def cosine_mean(result: ParameterGradients) -> float:
    """Mean cosine over all components, heads and layers."""
    return float(torch.cat([values.flatten() for values in result.cosine.values()]).mean())
