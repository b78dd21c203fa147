"""Memorized against control: score, interval and p-value of every component.

Two scores can be asked for (`Score`):

* `effect`: how much more the ablation of a component raises the NLL of memorized paragraphs than of
  controls, nats/token. A text of which the model is sure has more to lose in every component, so
  these differences are large for all of them wherever the sets differ in confidence.
* `interaction`: which components does one set need more *than the other components do*? Effects on
  the margin of the true token (logits) are divided by their mean over all components of the same
  unit and all paragraphs of the set; the score is the difference of these shares. It is 0 for every
  component if one set merely has more to lose than the other.

Intervals resample independent groups of paragraphs. P-values permute their labels
(`memcircuits.base.permutation`); with `interaction` both sets are divided by their means first.
They are corrected over all components of the same unit, and those that were not ablated count as
tests with p = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.permutation import PermutationTest, permutation_test
from memcircuits.base.statistics import bootstrap_means, interval
from memcircuits.evidence.ablation import MEASURES
from memcircuits.evidence.component_effects import ComponentEffects
from memcircuits.evidence.component_grid import RankedUnit

Score: TypeAlias = Literal["effect", "interaction"]
"""What components are ranked by."""

SCORE_UNITS: dict[Score, str] = {"effect": "nats/token", "interaction": "shares of the mean"}


@dataclass(frozen=True)
class ComponentScores:
    """Score, interval and p-value of every component.

    Attributes:
        score: memorized minus control.
        ci: its 95 % bootstrap interval; NaN where not ablated, and if a set has one group.
        p_value: one-sided; 1 where not ablated.
        permutations: how many were drawn for each unit, at most.
        notes: what the reader must know.
    """

    score: Float[Tensor, "layer column"]
    ci: Float[Tensor, "bound layer column"]
    p_value: Float[Tensor, "layer column"]
    permutations: int
    notes: tuple[str, ...]


def score_components(
    effects: ComponentEffects, score: Score, draws: int, generator: torch.Generator
) -> ComponentScores:
    """Score all components.

    Args:
        effects: the effects of independent groups of paragraphs.
        score: see `Score`.
        draws: number of bootstrap resamples, and the least number of permutations.
        generator: draws both.
    """
    memorized, control = (_values(effects, name, score) for name in ("memorized", "control"))
    estimated = effects.estimate
    exact = effects.on_grid(memorized.mean(0) - control.mean(0))
    resampled = bootstrap_means(memorized, draws, generator)
    resampled = resampled - bootstrap_means(control, draws, generator)
    bounds = interval(resampled)
    if min(len(memorized), len(control)) < 2:
        bounds = torch.full_like(bounds, torch.nan)
    p_value = torch.ones(len(effects.components))
    permutations, notes = 0, []
    for unit in effects.grid.units:
        columns = _columns(effects, unit)
        if not columns:
            continue
        n_tests = effects.grid.n_layers * effects.grid.size(unit)
        test = permutation_test(
            memorized[:, columns], control[:, columns], n_tests, generator, at_least=draws
        )
        p_value[columns] = test.p_value
        permutations = max(permutations, test.permutations)
        notes += _fit_note(test, unit)
    return ComponentScores(
        score=torch.where(effects.verified, exact, estimated),
        ci=torch.stack([effects.on_grid(bound) for bound in bounds]),
        p_value=effects.on_grid(p_value, 1.0),
        permutations=permutations,
        notes=tuple(notes),
    )


def _columns(effects: ComponentEffects, unit: RankedUnit) -> list[int]:
    """The components of a unit among those that were ablated."""
    return [i for i, component in enumerate(effects.components) if component.unit == unit]


def _values(effects: ComponentEffects, name: str, score: Score) -> Float[Tensor, "group component"]:
    """What is compared: rises of the NLL, or shares of the mean fall of the margin."""
    samples = effects.samples[name]
    if score == "effect":
        return samples[..., MEASURES.index("nll")]
    falls = -samples[..., MEASURES.index("margin")]
    shares = torch.empty_like(falls)
    for unit in effects.grid.units:
        columns = _columns(effects, unit)
        shares[:, columns] = falls[:, columns] / falls[:, columns].mean()
    return shares


def _fit_note(test: PermutationTest, unit: RankedUnit) -> list[str]:
    n_fitted = int(test.fitted.sum())
    if not n_fitted:
        return []
    return [
        f"p-values of {n_fitted} {unit}s are from a tail that was fitted to {test.permutations:,} "
        "permutations: so many tests would need more of them than were drawn."
    ]
