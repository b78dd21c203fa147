"""Every run of the page: an edit and what it did, in plain numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import memcircuits as mc
from memcircuits.editing.edit import Edit
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import STOEHR_2024
from memcircuits.editing.relearning import recovery_curve
from memcircuits.measure.gradients import mean_gradient
from unlearning_page.numbers import versions_line
from unlearning_page.setting import (
    ABLATION,
    AS_MANY,
    AS_MANY_RATES,
    AT_ONCE,
    BESIDES,
    BUCKETS,
    BUDGET,
    DEVELOPMENT,
    FRONT,
    FURTHER,
    RATES,
    SEED,
    TABLE,
    VARIANTS,
    setting,
)


def one(index: int, arm: str, *, rate: float = 0.0, variant: str = "", all_tokens: bool = False):
    """One paragraph edited by itself; without an arm nothing is done."""
    s = setting()
    target = s.targets[index]
    return edited(target, arm, rate, variant, 0.0 if all_tokens else None)


def besides(index: int, arm: str, *, rate: float = 0.0, variant: str = "", guarded: bool = False):
    """What an edit of one paragraph does to other recitations, which were no controls of it.

    With `guarded`, further recitations are among its controls.
    """
    s = setting()
    target = s.targets[index]
    others = s.targets[[i for i in range(len(s.targets)) if i != index]]
    with make(target, arm, rate, variant, guarded=guarded).apply(s.model):
        return {
            "others": mc.scan(s.model, others, progress=False).em.tolist(),
            "em": mc.scan(s.model, target, progress=False).em.tolist(),
            "kl": s.controls()["kl"],
        }


def unedited() -> dict[str, Any]:
    """The model as it is, and what it runs on."""
    return edited(setting().targets, "", 0, "", None) | {"versions": versions_line()}


def together(arm: str, *, rate: float = 0.0, variant: str = "", fraction: float = 0.001):
    """All paragraphs in one edit."""
    return edited(setting().targets, arm, rate, variant, None, fraction)


@cache
def all_forgotten() -> Edit:
    """All paragraphs by the default recipe."""
    return make(setting().targets, "top", 0.0, "natural")


def edited(
    target: mc.Paragraphs,
    arm: str,
    rate: float,
    variant: str,
    em_below: float | None,
    fraction: float = 0.001,
) -> dict[str, Any]:
    s = setting()
    if not arm:
        return s.controls() | s.target(target)
    start = time.process_time()
    if variant == "natural" and len(target) > 1:
        result = all_forgotten()
    else:
        result = make(target, arm, rate, variant, em_below, fraction)
    seconds = time.process_time() - start
    with result.apply(s.model):
        measured = s.controls() | s.target(target)
    return measured | {
        "edit_seconds": seconds,
        "steps": len(result.history["em"]) - 1,
        "stopped": result.stopped,
        "masked": result.n_masked,
        "candidates": result.n_candidates,
        "norm": result.norm,
    }


def make(
    target: mc.Paragraphs,
    arm: str,
    rate: float,
    variant: str,
    em_below: float | None = None,
    fraction: float = 0.001,
    guarded: bool = False,
) -> Edit:
    s = setting()
    many = len(target) > 1
    if not variant:
        recipe = dataclasses.replace(STOEHR_2024, learning_rate=rate)
        options: dict[str, Any] = {"control": s.few, "em_below": 0.0, "kl_budget": math.inf}
    else:
        recipe = AT_ONCE if variant == "at-once" else VARIANTS[variant][1]
        options = {"control": s.control, "em_below": em_below, "curvature": s.curvature}
        # An ablation is to forget too, whatever that costs: the cost is what is compared.
        options["kl_budget"] = BUDGET if em_below == 0 else 0.05 if many else 1.0
        if guarded:
            options |= {"control": s.guarded, "curvature": s.guarded_curvature}
    return mc.unlearn(
        s.model, target, mask=arm, recipe=recipe, fraction=fraction, progress=False, **options
    )


def relearned(text: str) -> dict[str, Any]:
    """Half of the forgotten, while training on the other half or on other text."""
    s = setting()
    half = len(s.targets) // 2
    trained = s.targets[half:] if text == "half" else s.control[:half]
    result = all_forgotten()
    curve = recovery_curve(
        s.model, result, s.targets[:half], trained, steps=10, every=1, progress=False
    )
    return {"rows": curve.to_frame().to_dict("records"), "n": half, "to_25": curve.steps_to(25)}


def noisy(mask: str) -> dict[str, Any]:
    s = setting()
    noise = weight_noise(
        s.model, s.targets[:16], s.unseen[:16], mask=mask, seed=SEED, progress=False
    )
    rows = noise.to_frame().to_dict("records")
    return {"rows": rows, "weights": noise.n_weights, "n": 16}


def share(bucket: str) -> dict[str, Any]:
    """Share of the lower layers in the paper's gradient map, resampled in up to 20 groups."""
    s = setting()
    paragraphs = mc.Paragraphs.shipped()
    em = mc.scan(s.model, paragraphs, progress=False).em
    low, high = BUCKETS[bucket]
    chosen = paragraphs[(em >= low) & (em <= high)]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(SEED))]
    weights = s.adapter.weights()
    sizes, groups = [], []
    for rows in torch.arange(len(chosen)).tensor_split(min(20, len(chosen))):
        _, gradients = mean_gradient(s.adapter, chosen[rows], weights, progress=False)
        sizes.append(len(rows))
        groups.append([w.split(g).clone() for w, g in zip(weights, gradients, strict=True)])
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.ones(len(groups))]
    for _ in range(200):
        picks = torch.randint(len(groups), (len(groups),), generator=generator)
        draws.append(torch.bincount(picks, minlength=len(groups)).float())
    factors = torch.stack(draws) * torch.tensor(sizes)
    factors = factors / factors.sum(1, keepdim=True)
    layers = torch.zeros(len(draws), s.adapter.n_layers)
    for i, weight in enumerate(weights):
        stacked = torch.stack([group[i] for group in groups])
        for j, factor in enumerate(factors):
            mean = (factor @ stacked.flatten(1)).view(stacked.shape[1:])
            layers[j, weight.layer] += mean.abs().amax((-2, -1)).sum()
    half = s.adapter.n_layers // 2
    shares = layers[:, :half].sum(1) / layers.sum(1)
    bounds = torch.quantile(shares[1:], torch.tensor([0.025, 0.975])).tolist()
    return {"share": float(shares[0]), "bounds": bounds, "n": len(chosen), "groups": len(groups)}


def jobs() -> list[list[tuple[str, Callable[[], dict[str, Any]]]]]:
    """Chains of named runs; the runs of one chain share what their process has prepared."""
    n = 88 - DEVELOPMENT
    natural = [("before", unedited)]
    natural += [_one("natural", i, "top", variant="natural") for i in range(n)]
    natural.append(("together/natural", lambda: together("top", variant="natural")))
    natural += [(f"relearn/{text}", lambda text=text: relearned(text)) for text in ("half", "text")]
    for name in [v for v in VARIANTS if v != "natural"]:
        natural += [_one(name, i, "top", variant=name) for i in range(ABLATION)]
    natural += [
        _one("all-tokens", i, "top", variant="margin", all_tokens=True) for i in range(ABLATION)
    ]
    for i in range(ABLATION):
        for name, options in BESIDES.items():
            natural.append(
                (
                    f"besides/{name}/{i:02d}",
                    lambda i=i, options=options: besides(i, **options),
                )
            )
    for part in (0.001, 0.01):
        natural.append(
            (
                f"together/at-once-{part}",
                lambda part=part: together("top", variant="at-once", fraction=part),
            )
        )
    natural += [(f"noise/{mask}", lambda mask=mask: noisy(mask)) for mask in ("top", "random")]
    rest = [[(f"share/{bucket}", lambda bucket=bucket: share(bucket))] for bucket in BUCKETS]
    for i in range(n):
        chain = [_one(f"{arm}-{rate:g}", i, arm, rate=rate) for arm, rate in TABLE.items()]
        if i < FRONT:
            chain += [
                _one(f"{arm}-{rate:g}", i, arm, rate=rate)
                for arm, rates in RATES.items()
                for rate in rates
                if rate != TABLE[arm]
            ]
        rest += [[run] for run in chain]
        if i + 1 == FRONT:
            rest += [
                [(f"together/{arm}-{rate:g}", lambda arm=arm, rate=rate: together(arm, rate=rate))]
                for arm in TABLE
                for rate in (TABLE[arm], *FURTHER.get(arm, ()))
            ]
            rest += [
                [
                    (
                        f"together/many-{rate:g}",
                        lambda rate=rate: together("top", rate=rate, fraction=AS_MANY),
                    )
                ]
                for rate in AS_MANY_RATES
            ]
    return [natural, *rest]


def _one(name: str, index: int, arm: str, **options: Any):
    return f"{name}/{index:02d}", lambda: one(index, arm, **options)


def perform(number: int, work: Path, only: str) -> None:
    """One chain, as far as its files are not there yet."""
    for name, run in jobs()[number]:
        path = work / f"{name}.json"
        if path.exists() or not re.match(only, name):
            continue
        start = time.process_time()
        outcome = run()
        outcome |= {"seconds": time.process_time() - start, "fingerprint": setting().fingerprint}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=work, suffix=".part", delete=False) as file:
            json.dump(outcome, file)
        os.replace(file.name, path)
