"""Depth against harm: deep unlearning, parts of it left out, and rivals.

The rivals are written from their papers and have our number of steps, decay of the learning rate,
fraction of the weights and texts to keep. Their learning rates and KL weights are chosen on
paragraphs that are not reported.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import memcircuits as mc
from memcircuits.editing.audits.measures import draw_attacks
from memcircuits.editing.edit import Edit
from memcircuits.editing.recipe import DEEP, STOEHR_2024, ForgettingTerm, Recipe
from memcircuits.measure.continuation import continuation_log_probs, kl_divergence
from memcircuits.models.adapter import Adapter
from unlearning_page.numbers import interval, read, table
from unlearning_page.setting import SEED, setting

TITLE = "Depth against harm"
N_TUNED, N_REPORTED, N_ATTACKS = 1, 3, 5
WEIGHTS = (100.0, 1000.0)  # of the KL, for rivals
RATES = (3e-5, 1e-4)
RIVALS: Mapping[ForgettingTerm, str] = {
    "nll": "the paper's objective: likelihood down, KL",
    "npo": "negative preference optimization, KL",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """An edit of the front: its label, and what makes it of a paragraph."""

    label: str
    make: Callable[[mc.Paragraphs], Edit]


def deep(**options: Any) -> Callable[[mc.Paragraphs], Edit]:
    """Deep unlearning with other options; `kl_weight` and `curvature` are the recipe's."""
    of_recipe = {name: options.pop(name) for name in ("kl_weight", "curvature") if name in options}

    def make(target: mc.Paragraphs) -> Edit:
        s = setting()
        given = options | ({"twin": s.twin} if options.get("twin") else {})
        recipe = dataclasses.replace(DEEP, **of_recipe)
        return mc.unlearn(s.model, target, s.given, recipe=recipe, progress=False, **given)

    return make


def rival(objective: ForgettingTerm, rate: float, weight: float) -> Callable[..., Edit]:
    recipe = Recipe(
        steps=DEEP.steps,
        objective=objective,
        learning_rate=rate,
        kl_weight=weight,
        control_batch=2 * DEEP.control_batch,
        decay=True,
    )
    return lambda target: _unlearned(target, recipe, setting().given_to_rivals, fraction=1.0)


def _unlearned(
    target: mc.Paragraphs, recipe: Recipe, control: mc.Paragraphs, **options: Any
) -> Edit:
    """An edit without a stop: EM below 0 is never reached, and there is no budget."""
    unlimited: dict[str, Any] = {"em_below": 0.0, "kl_budget": float("inf"), "progress": False}
    return mc.unlearn(setting().model, target, control, recipe=recipe, **{**unlimited, **options})


def arms(settings: Mapping[str, tuple[float, float]]) -> dict[str, Arm]:
    """Every arm by name, with the rivals at the rates and weights chosen for them."""
    found = {
        "deep": Arm("deep", deep()),
        "twin": Arm("deep, the twin given", deep(twin=True)),
        "plain": Arm("deep, not whitened", deep(curvature="none")),
    }
    for objective, label in RIVALS.items():
        rate, weight = settings[objective]
        found[objective] = Arm(
            f"{label} (lr {rate:g}, KL weight {weight:g})", rival(objective, rate, weight)
        )
    published = dataclasses.replace(STOEHR_2024, learning_rate=1e-4)
    found["published"] = Arm(
        "the paper's recipe as published, all weights, lr 1e-4",
        lambda target: _unlearned(target, published, setting().given[:13], mask="all"),
    )
    found["surface"] = Arm(
        'depth="surface", 0.1 % of the weights',
        lambda target: mc.unlearn(
            setting().model, target, setting().given, depth="surface", progress=False
        ),
    )
    return found


def tuning() -> dict[str, tuple[ForgettingTerm, tuple[float, float], Arm]]:
    """The runs that choose the rivals' learning rates and KL weights."""
    return {
        f"tuning-{objective}-{rate:g}-{weight:g}": (
            objective,
            (rate, weight),
            Arm(label, rival(objective, rate, weight)),
        )
        for objective, label in RIVALS.items()
        for rate in RATES
        for weight in WEIGHTS
    }


def chosen_settings(runs: Mapping[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """For each rival the rate and weight that bring the attacked EM below 5 at the least KL.

    Where none do, those with the smallest attacked EM.
    """
    best: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {}
    for name, (objective, tried, _) in tuning().items():
        mine = read(runs, name)
        em = max(run["em_attacked"] for run in mine)
        cost = (max(em, 5.0), sum(run["kl"] for run in mine))
        if objective not in best or cost < best[objective][0]:
            best[objective] = (cost, tried)
    return {objective: tried for objective, (_, tried) in best.items()}


def run(arm: Arm, target: mc.Paragraphs, kept: Path | None = None) -> dict[str, Any]:
    """Make the edit, keep it in a file for its audit, and measure it."""
    start = time.process_time()
    edit = arm.make(target)
    seconds = time.process_time() - start
    if kept is not None:
        edit.save(kept)
    before = setting().log_probs(target)
    with edit.apply(setting().model):
        found = measured(target, setting().adapter, *before)
    return found | {"seconds": seconds, "masked": edit.n_masked / edit.n_candidates}


def never_trained(target: mc.Paragraphs) -> dict[str, Any]:
    """The twin as if it were an edit."""
    return measured(target, setting().twin_adapter, *setting().log_probs(target))


def measured(
    target: mc.Paragraphs, adapter: Adapter, reference: Tensor, unedited: Tensor
) -> dict[str, Any]:
    """Depth, recitation and harm of the edited organism, or of its twin."""
    s = setting()
    with adapter.preserving_state():
        log_p = continuation_log_probs(adapter, target)
    distance = float(kl_divergence(reference, log_p).mean())
    nll = [float(-p.gather(-1, target.continuation[..., None]).mean()) for p in (log_p, reference)]
    nll_before = float(-unedited.gather(-1, target.continuation[..., None]).mean())
    attacked = draw_attacks(target, s.unseen, s.adapter.n_ctx, N_ATTACKS, SEED)
    entries = [entry for group in attacked.values() for entry in group]
    em = [int(mc.scan(adapter, entry, progress=False).em.max()) for entry in entries]
    return {
        "depth": 1 - distance / float(kl_divergence(reference, unedited).mean()),
        "remembered": (nll[1] - nll[0]) / (nll[1] - nll_before),
        "em": int(mc.scan(adapter, target, progress=False).em.max()),
        "em_attacked": max(em),
        "n_attacks": len(entries),
        "kl": s.own.mean_kl(adapter, None),
        "own": float(mc.scan(adapter, s.own.paragraphs, progress=False).em.float().mean()),
        "others": int(mc.scan(adapter, s.others, progress=False).is_memorized.sum()),
    }


COLUMNS = {
    "depth": ("erasure depth", 2),
    "remembered": ("remembered bits left", 2),
    "em_attacked": ("attacked EM", 1),
    "kl": ("unseen KL (nats/token)", 5),
    "own": ("unseen own EM (of 50)", 1),
    "others": ("others in full", 1),
}


def section(runs: Mapping[str, dict[str, Any]]) -> str:
    """The text of the section, from the runs."""
    rows = [
        [label, *(interval((run[key] for run in mine), n) for key, (_, n) in COLUMNS.items())]
        for label, mine in rows_of(runs)
    ]
    first = read(runs, "deep")
    head = ["edit of one paragraph", *(title for title, _ in COLUMNS.values())]
    rates, weights = (" and ".join(f"{x:g}" for x in values) for values in (RATES, WEIGHTS))
    return (
        f"\n{len(first)} paragraphs of the second half, each forgotten by itself in every way. "
        f"Attacked EM is the largest over {first[0]['n_attacks']} prefixes. Every edit but the "
        "published recipe is given the same texts to keep, and may change all weights of the "
        "blocks where no fraction is named. The rivals take as many steps as deep unlearning; "
        f"their learning rates were chosen among {rates}, and their KL weights among {weights}, on "
        f"{N_TUNED} paragraph of the first half, by the KL at which the attacked EM falls below 5. "
        "The last line is the model that was trained without these paragraphs, as if it were an "
        "edit: what it differs by on other text is the chance of another training.\n\n"
        f"{table(head, rows)}\n"
        "\n![Remembered bits left against the KL on unseen controls](pictures/unlearning.png)\n"
    )


def rows_of(
    runs: Mapping[str, dict[str, Any]],
) -> Sequence[tuple[str, list[dict[str, Any]]]]:
    """Label and runs of every row of the table."""
    rows = [(arm.label, read(runs, name)) for name, arm in arms(chosen_settings(runs)).items()]
    return [*rows, ("never trained on it (the twin)", read(runs, "never"))]
