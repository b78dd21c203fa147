"""Fine-tuning of few weights: the paper's recipe, and what the authors' code does beside it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.editing.masks import Candidates, Mask
from memcircuits.editing.recipe import STOEHR_2024
from memcircuits.editing.unlearning_objective import ReferenceDistribution
from memcircuits.measure.continuation import score_continuation
from memcircuits.measure.decoding import greedy_continuations
from reproduction.charts import Chart, bars
from reproduction.statistics import mean
from reproduction.study import SEEN, UNSEEN, CannotRun, Finding, Outcome, Study, experiment, row

PRINTED = {
    ("unlearn", "all"): ("26.90", "45.11"),
    ("unlearn", "top"): ("26.75", "45.84"),
    ("unlearn", "random"): ("49.80", "44.86"),
    ("edit", "all"): ("25.65", "37.57"),
    ("edit", "top"): ("33.65", "38.67"),
}
Job = Literal["unlearn", "edit"]
# Arms of the authors' code: its Adam has a weight decay of 1 on every weight, masked or not.
PUBLISHED: dict[str, tuple[Job, float]] = {
    "decay alone": ("unlearn", 0.0),
    "unlearn, top 0.1 % and decay": ("unlearn", 0.001),
    "edit, top 0.1 % and decay": ("edit", 0.001),
}
STEPS, LEARNING_RATE, DECAY = 5, 1e-5, 1.0
BINS = ("0-10", "11-29", "30-49", "50")


@experiment("Sparse fine-tuning", "figure 5")
def fine_tuning(study: Study) -> Outcome:
    controls = study.draw(study.buckets.get("0-10", study.control), SEEN + UNSEEN)
    if len(controls) < SEEN + 2:
        raise CannotRun(f"{len(controls)} controls; an edit is given {SEEN}, others judge it")
    seen = controls[:SEEN]
    unseen = greedy_continuations(study.model, controls[SEEN:], **study.options)
    clean, corrupted = study.pairs
    n = min(study.edits, len(clean))
    arms: dict[str, tuple[Tensor, Tensor]] = {"no edit": edited_em(study, n, unseen, None)}
    for job, mask in PRINTED:
        name = f"{job}, " + {"all": "all weights"}.get(mask, f"{mask} 0.1 %")
        arms[name] = edited_em(study, n, unseen, (job, mask, seen))
    for name, (job, fraction) in PUBLISHED.items():
        targets = clean if job == "unlearn" else corrupted
        em = []
        for i in range(n):
            with published_edit(study, targets[i], seen[:10], job=job, fraction=fraction):
                em.append([scan_em(study, group) for group in (clean[i], unseen)])
        arms[name] = collected(em)
    printed = dict(zip(list(arms)[1:], PRINTED.values(), strict=False))
    return Outcome(em_rows(arms, printed, n), em_charts(arms))


def scan_em(study: Study, paragraphs: mc.Paragraphs) -> Tensor:
    return mc.scan(study.model, paragraphs, **study.options).em.float()


def collected(em: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """EM of the targets [edit], and of the controls [edit, paragraph]."""
    return torch.cat([target for target, _ in em]), torch.stack([others for _, others in em])


def edited_em(
    study: Study, n: int, unseen: mc.Paragraphs, arm: tuple[str, str, mc.Paragraphs] | None
) -> tuple[Tensor, Tensor]:
    """EM after each of `n` edits by the paper's recipe; exactly the masked weights change."""
    clean, corrupted = study.pairs
    em = []
    for i in range(n):
        change: Any = contextlib.nullcontext()
        if arm is not None:
            job, mask, seen = arm
            options: dict[str, Any] = {"mask": mask, "seed": study.seed + i, **study.options}
            options |= {"recipe": STOEHR_2024, "kl_budget": math.inf}
            if job == "unlearn":
                edit = mc.unlearn(study.model, clean[i], seen, em_below=0.0, **options)
            else:
                edit = mc.edit(study.model, clean[i], corrupted[i], seen, **options)
            change = edit.apply(study.model)
        with change:
            em.append([scan_em(study, group) for group in (clean[i], unseen)])
    return collected(em)


@contextlib.contextmanager
def published_edit(
    study: Study, target: mc.Paragraphs, seen: mc.Paragraphs, *, job: Job, fraction: float
) -> Iterator[None]:
    """Inside, the model is as the authors' code leaves it: its optimizer, step by step.

    Gradients outside the mask, which is chosen at the first step, are zero. Adam adds the decay to
    the gradient, so every weight moves, by up to the learning rate in each step. `fraction` 0:
    all gradients are zero, and the decay alone moves the weights.
    """
    adapter = study.adapter
    candidates = Candidates.of(adapter)
    parameters = [weight.parameter for weight in candidates.weights]
    reference = ReferenceDistribution.of(adapter, seen, study.memory_budget)
    sign = -1.0 if job == "unlearn" else 1.0
    moving = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(moving, lr=LEARNING_RATE, weight_decay=DECAY)
    keep: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
    with candidates.choose(1.0, None, "all").restored():
        for step in range(STEPS):
            with adapter.preserving_state(grad=parameters), torch.enable_grad():
                kl = reference.kl(adapter, torch.arange(len(seen))).mean() * seen.n_continuation
                loss = kl + sign * 0.1 * score_continuation(adapter, target).nll.mean()
                gradients = torch.autograd.grad(loss, parameters)
            if step == 0 and fraction:
                keep = marked(candidates.choose(fraction, gradients), parameters)
            for new, gradient, kept in zip(moving, gradients, keep, strict=True):
                new.grad = gradient * kept
            optimizer.step()
            with torch.no_grad():
                for parameter, new in zip(parameters, moving, strict=True):
                    parameter.copy_(new)
        yield


def marked(mask: Mask, parameters: Sequence[Tensor]) -> list[Tensor]:
    """For each parameter a tensor that is 1 at its weights in the mask and 0 elsewhere."""
    marks = {id(parameter): torch.zeros_like(parameter) for parameter in parameters}
    for weight, index in zip(mask.weights, mask.indices, strict=True):
        view = weight.split(marks[id(weight.parameter)])
        view[torch.unravel_index(index, view.shape)] = 1.0
    return [marks[id(parameter)] for parameter in parameters]


def em_rows(
    arms: dict[str, tuple[Tensor, Tensor]], printed: dict[str, tuple[str, str]], n: int
) -> list[Finding]:
    """Mean EM of targets and controls after each arm, beside the paper's."""
    ours = (
        f"the paper's recipe: {STOEHR_2024.steps} steps of Adam at {STOEHR_2024.learning_rate:g}; "
        "exactly the masked weights change; the controls are others than those of the edit, with "
        "their own continuations (the paper's are those in its KL term)"
    )
    theirs = (
        f"as the authors' code runs: {STEPS} steps of Adam at {LEARNING_RATE:g}, with a weight "
        f"decay of {DECAY:g} that moves every weight"
    )
    rows = []
    for arm, values in arms.items():
        note = theirs if arm in PUBLISHED else "" if arm == "no edit" else ours
        numbers = printed.get(arm, ("", ""))
        for group, em, number in zip(("the target", "controls"), values, numbers, strict=True):
            per_edit = em if em.ndim == 1 else em.mean(1)
            rows.append(row(f"EM of {group}: {arm}", number, mean(per_edit), n, "tokens", note))
    return rows


def em_charts(arms: dict[str, tuple[Tensor, Tensor]]) -> list[Chart]:
    """Means of all arms, and for targets and controls how many of them keep which EM."""
    points = [
        {"arm": arm, "EM": float(em.mean()), "of": group}
        for arm, values in arms.items()
        for group, em in zip(("the target", "controls"), values, strict=True)
    ]
    labels: dict[str, Any] = {"by": "of", "units": "tokens"}
    charts = [bars("EM after fine-tuning, of 50 tokens", points, "arm", "EM", **labels)]
    for column, group in enumerate(("targets", "controls")):
        points = [
            {"EM": name, "share": share, "arm": arm}
            for arm, values in arms.items()
            for name, share in em_shares(values[column]).items()
        ]
        labels = {"by": "arm", "units": "%", "y_label": f"share of the {group}"}
        charts.append(
            bars(f"EM before and after editing, {group}", points, "EM", "share", **labels)
        )
    return charts


def em_shares(em: Tensor) -> dict[str, float]:
    """Share of paragraphs in each of the paper's ranges of EM, per cent."""
    em = em.flatten()
    shares = {}
    for name in BINS:
        low, _, high = name.partition("-")
        inside = (em >= int(low)) & (em <= int(high or low))
        shares[name] = 100 * float(inside.float().mean())
    return shares
