"""The rivals of deep unlearning on the front, and the settings that each is tried with.

They are written from their papers and are given the same texts to keep as ours. Their settings are
chosen on paragraphs that are not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import memcircuits as mc
from memcircuits.editing.edit import Edit
from memcircuits.editing.recipe import DEEP, ForgettingTerm, Recipe
from unlearning_page.removal import LOCALIZERS, balanced_subnet, delete_neurons, kfac
from unlearning_page.setting import setting

Settings = tuple[float, ...]


@dataclass(frozen=True)
class Rival:
    """A rival.

    Attributes:
        label: what it is called on the page.
        make: from a paragraph and settings to an edit.
        grid: the settings to choose from.
        told: from settings to what the page says of them.
    """

    label: str
    make: Callable[..., Edit]
    grid: Sequence[Settings]
    told: Callable[..., str]

    def described(self, settings: Settings) -> str:
        return f"{self.label} ({self.told(*settings)})"


def by_descent(
    objective: ForgettingTerm, target: mc.Paragraphs, rate: float, weight: float
) -> Edit:
    """Adam on the objective and a KL, with our number of steps, decay and texts to keep."""
    recipe = Recipe(
        steps=DEEP.steps,
        objective=objective,
        learning_rate=rate,
        kl_weight=weight,
        control_batch=2 * DEEP.control_batch,
        decay=True,
    )
    return unlearned(target, recipe, setting().given_to_rivals, fraction=1.0)


def unlearned(
    target: mc.Paragraphs, recipe: Recipe, control: mc.Paragraphs, **options: Any
) -> Edit:
    """An edit without a stop: EM below 0 is never reached, and there is no budget."""
    unlimited: dict[str, Any] = {"em_below": 0.0, "kl_budget": float("inf"), "progress": False}
    return mc.unlearn(setting().model, target, control, recipe=recipe, **{**unlimited, **options})


_DESCENT = tuple(product((3e-5, 1e-4), (100.0, 1000.0)))


def _rate_and_weight(rate: float, weight: float) -> str:
    return f"lr {rate:g}, KL weight {weight:g}"


RIVALS: Mapping[str, Rival] = {
    "nll": Rival(
        "the paper's objective: likelihood down, KL",
        partial(by_descent, "nll"),
        _DESCENT,
        _rate_and_weight,
    ),
    "npo": Rival(
        "negative preference optimization, KL",
        partial(by_descent, "npo"),
        _DESCENT,
        _rate_and_weight,
    ),
    "balanced": Rival(
        "BalancedSubnet",
        balanced_subnet,
        tuple(product((0.001, 0.01, 0.05), (1.0, 100.0, 10000.0))),
        lambda dropped, rate: f"{100 * dropped:g} % of the MLPs' weights dropped, lr {rate:g}",
    ),
    "delete": Rival(
        "neurons deleted",
        delete_neurons,
        tuple(product(range(len(LOCALIZERS)), (1, 6, 31, 61))),
        lambda localizer, n: f"{int(n)}, by {LOCALIZERS[int(localizer)].replace('-', ' ')}",
    ),
    "kfac": Rival(
        "K-FAC removal, the text not read",
        kfac,
        tuple(product((0.8, 0.9, 0.97, 0.99, 0.999), (1, 2, 3, 6))),
        lambda mass, layers: f"{100 * mass:g} % of the curvature kept in {int(layers)} layers",
    ),
}
