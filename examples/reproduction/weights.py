"""Experiments on weights: gradients, contrast, sparse fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.editing.recipe import STOEHR_2024
from memcircuits.measure.decoding import greedy_continuations
from reproduction.statistics import (
    agreeing,
    intervals,
    jackknife,
    lower_half,
    mean,
    per_head,
    top_head,
)
from reproduction.study import SEEN, UNSEEN, CannotRun, Outcome, Study, experiment, heatmap, row


@experiment("Parameter gradients", "figures 4 and 9")
def gradients(study: Study) -> Outcome:
    paper = {
        "0-10": ("53.01", "29"),
        "11-29": ("27.14", "40"),
        "30-49": ("14.30", "54"),
        "50": ("9.71", "59"),
    }
    note = "the sum grows with the loss; the share does not, and is the number to compare"
    result, points = [], []

    def layers(some: mc.Paragraphs) -> Tensor:
        return mc.parameter_gradients(study.model, some, **study.options).layers

    def both(layers: Tensor) -> list[float]:
        return [float(layers.sum()), lower_half(layers)]

    for bucket, (total, share) in paper.items():
        names = [
            f"sum of the largest |gradient| of all components, EM {bucket}",
            f"share of the lower half of the layers, EM {bucket}",
        ]
        values, n = [None, None], 0
        if bucket in study.buckets:
            paragraphs = study.draw(study.buckets[bucket])
            n = len(paragraphs)
            whole, rest = jackknife(paragraphs, layers)
            values = intervals(both(whole), [both(part) for part in rest])
            shares = 100 * whole / whole.sum()
            points += [
                {"layer": i, "share": float(value), "EM": f"EM {bucket}"}
                for i, value in enumerate(shares)
            ]
        notes = [note, ""] if n else ["no such paragraph"] * 2
        for what, printed, value, units, told in zip(
            names, (total, share), values, ("", "%"), notes, strict=True
        ):
            result.append(row(what, printed, value, n, units, told))
    chart = {
        "frame": points,
        "title": "Gradient by layer",
        "x": "layer",
        "y": "share",
        "by": "EM",
        "y_label": "share of the gradient",
        "units": "%",
    }
    return Outcome(result, [("Bars", chart)])


@experiment("Contrastive gradients", "equation 3")
def contrast(study: Study) -> Outcome:
    result, n_heads = study.contrast, study.adapter.n_heads
    heads = result.per_head(n_heads)
    best = top_head(heads)
    n = len(study.memorized)
    each = [top_head(per_head(result.samples, i, n_heads)) for i in range(n)]
    cosine = torch.cat([values.flatten() for values in result.cosine.values()])
    told = "at the original weights the KL term has no gradient: this is the NLL's alone"
    spread = f"from {cosine.min():.2f} to {cosine.max():.2f} by component"
    what = "cosine of memorized and other gradients, mean over components"
    rows = [
        row("head with the largest gradient", "L1H2", str(best), n, note=told),
        row("paragraphs whose own largest is that head", "", agreeing(each, best), n, "%"),
        row(what, "", float(cosine.mean()), n, note=spread),
    ]
    chart = heatmap("Largest |gradient| of each head", heads, "gradient", result.units, best)
    return Outcome(rows, [chart])


@experiment("Sparse fine-tuning", "figure 5")
def fine_tuning(study: Study) -> Outcome:
    controls = study.draw(study.buckets.get("0-10", study.control), SEEN + UNSEEN)
    if len(controls) < SEEN + 2:
        raise CannotRun(f"{len(controls)} controls; an edit is given {SEEN}, others judge it")
    seen, unseen = controls[:SEEN], controls[SEEN:]
    unseen = greedy_continuations(study.model, unseen, **study.options)
    clean, twins = study.pairs
    n = min(study.edits, len(clean))
    paper = {
        ("unlearn", "all"): ("26.90", "45.11"),
        ("unlearn", "top"): ("26.75", "45.84"),
        ("unlearn", "random"): ("49.80", "44.86"),
        ("edit", "all"): ("25.65", "37.57"),
        ("edit", "top"): ("33.65", "38.67"),
    }
    note = (
        f"the paper's recipe: {STOEHR_2024.steps} steps of Adam at {STOEHR_2024.learning_rate:g}; "
        "exactly the masked weights change; the controls are others than those of the edit, with "
        "their own continuations (the paper's are those in its KL term)"
    )
    result, points = [], []
    for (job, mask), printed in paper.items():
        em = torch.empty(2, n)
        for i in range(n):
            options: dict[str, Any] = {"mask": mask, "seed": study.seed + i, **study.options}
            options |= {"recipe": STOEHR_2024, "kl_budget": None}
            if job == "unlearn":
                made = mc.unlearn(study.model, clean[i], seen, em_below=0.0, **options)
            else:
                made = mc.edit(study.model, clean[i], twins[i], seen, **options)
            with made.apply(study.model):
                for j, group in enumerate((clean[i], unseen)):
                    em[j, i] = mc.scan(study.model, group, **study.options).em.float().mean()
        arm = f"{job}, " + {"all": "all weights"}.get(mask, f"{mask} 0.1 %")
        for group, values, number in zip(("the target", "controls"), em, printed, strict=True):
            value = mean(values)
            what = f"EM of {group} after {arm}"
            result.append(row(what, number, value, n, "tokens", "" if result else note))
            points.append({"arm": arm, "EM": value[0], "of": f"{group}, here"})
            points.append({"arm": arm, "EM": float(number), "of": f"{group}, paper"})
    chart = {
        "frame": points,
        "title": "EM after fine-tuning, of 50 tokens",
        "x": "arm",
        "y": "EM",
        "by": "of",
        "units": "tokens",
    }
    return Outcome(result, [("Bars", chart)])
