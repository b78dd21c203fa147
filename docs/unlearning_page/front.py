"""Depth against harm: deep unlearning, parts of it left out, and rivals."""

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
from memcircuits.editing.recipe import DEEP, STOEHR_2024
from memcircuits.measure.continuation import continuation_log_probs, kl_divergence
from memcircuits.models.adapter import Adapter
from unlearning_page.numbers import interval, read, table
from unlearning_page.rivals import RIVALS, Settings, unlearned
from unlearning_page.setting import SEED, setting

TITLE = "Depth against harm"
N_TUNED, N_REPORTED, N_ATTACKS = 1, 3, 5
FRACTIONS = (0.1, 0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class Arm:
    """An edit of the front: its label, and what makes it of a paragraph."""

    label: str
    make: Callable[[mc.Paragraphs], Edit]


def deep(**options: Any) -> Callable[[mc.Paragraphs], Edit]:
    """Deep unlearning with other options; `curvature` is the recipe's."""
    recipe = dataclasses.replace(DEEP, curvature=options.pop("curvature", DEEP.curvature))

    def make(target: mc.Paragraphs) -> Edit:
        s = setting()
        given = options | ({"twin": s.twin} if options.get("twin") else {})
        return mc.unlearn(s.model, target, s.given, recipe=recipe, progress=False, **given)

    return make


def published(target: mc.Paragraphs) -> Edit:
    """The paper's recipe, with a larger rate: at its own, no text is forgotten."""
    recipe = dataclasses.replace(STOEHR_2024, learning_rate=1e-4)
    return unlearned(target, recipe, setting().given[:13], mask="all")


def surface(target: mc.Paragraphs) -> Edit:
    s = setting()
    return mc.unlearn(s.model, target, s.given, depth="surface", progress=False)


def arms(settings: Mapping[str, Settings] | None = None) -> dict[str, Arm]:
    """Every arm by name, with the rivals at the settings chosen for them, if these are given."""
    found = {
        "deep": Arm("deep", deep()),
        "twin": Arm("deep, the twin given", deep(twin=True)),
        "plain": Arm("deep, not whitened", deep(curvature="none")),
    }
    for fraction in FRACTIONS:
        label = f"deep, {100 * fraction:g} % of the weights"
        found[f"deep-{fraction:g}"] = Arm(label, deep(fraction=fraction))
    for name, chosen in (settings or {}).items():
        found[name] = rival_arm(name, chosen)
    found["published"] = Arm("the paper's recipe as published, all weights, lr 1e-4", published)
    found["surface"] = Arm('depth="surface", 0.1 % of the weights', surface)
    return found


def rival_arm(name: str, settings: Settings) -> Arm:
    rival = RIVALS[name]
    return Arm(rival.described(settings), lambda target: rival.make(target, *settings))


def tuning() -> dict[str, tuple[str, Settings, Arm]]:
    """The runs that choose the rivals' settings: name -> rival, settings, arm."""
    return {
        f"tuning-{name}-{'-'.join(f'{x:g}' for x in settings)}": (
            name,
            settings,
            rival_arm(name, settings),
        )
        for name, rival in RIVALS.items()
        for settings in rival.grid
    }


def chosen_settings(runs: Mapping[str, dict[str, Any]]) -> dict[str, Settings]:
    """For each rival the settings that bring the attacked EM below 5 at the least KL.

    Where none do, those with the smallest attacked EM.
    """
    best: dict[str, tuple[tuple[float, float], Settings]] = {}
    for name, (rival, tried, _) in tuning().items():
        mine = read(runs, name)
        em = max(run["em_attacked"] for run in mine)
        cost = (max(em, 5.0), sum(run["kl"] for run in mine))
        if rival not in best or cost < best[rival][0]:
            best[rival] = (cost, tried)
    return {rival: tried for rival, (_, tried) in best.items()}


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
    n = len(read(runs, "deep"))
    head = ["edit of one paragraph", *(title for title, _ in COLUMNS.values())]
    return (
        f"\n{n} paragraphs of the second half, each forgotten by itself in every way. Attacked EM "
        f"is the largest over {read(runs, 'deep')[0]['n_attacks']} prefixes. Every edit but the "
        "published recipe is given the same texts to keep, and may change all weights of the "
        "blocks where nothing else is said. The rivals that descend take as many steps as deep "
        f"unlearning. Each rival's settings, {_grids()}, were chosen on {N_TUNED} paragraph of the "
        "first half, by the KL at which the attacked EM falls below 5, or else by the attacked EM. "
        "K-FAC removal is one edit for all texts and is meant to forget every recitation, so that "
        "the last column is no harm of it. "
        "The last line is the model that was trained without these paragraphs, as if it were an "
        "edit: what it differs by on other text is the chance of another training.\n\n"
        f"{table(head, rows)}\n"
        "\n![Remembered bits left against the KL on unseen controls](pictures/unlearning.png)\n"
    )


def _grids() -> str:
    smallest, largest = (f(len(rival.grid) for rival in RIVALS.values()) for f in (min, max))
    return f"{smallest} to {largest} choices"


def rows_of(
    runs: Mapping[str, dict[str, Any]],
) -> Sequence[tuple[str, list[dict[str, Any]]]]:
    """Label and runs of every row of the table."""
    rows = [(arm.label, read(runs, name)) for name, arm in arms(chosen_settings(runs)).items()]
    return [*rows, ("never trained on it (the twin)", read(runs, "never"))]
