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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.permutation import PermutationTest, permutation_test
from memcircuits.base.simultaneous import rank_intervals
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
        ranks: best and worst rank that a component may have among those that were ablated, all
            together at 95 % (`memcircuits.base.simultaneous`); NaN where there is no `ci`.
        permutations: the largest number that was drawn for a unit.
        notes: what the reader must know.
    """

    score: Float[Tensor, "layer column"]
    ci: Float[Tensor, "bound layer column"]
    p_value: Float[Tensor, "layer column"]
    ranks: Float[Tensor, "bound layer column"]
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

    Raises:
        InputError: for `interaction`, if components of a unit do not matter to a set on average.
    """
    measured = {name: _measured(effects, name, score) for name in ("memorized", "control")}
    if score == "interaction":
        _check_shares(effects, measured)
    means = {name: _shares(effects, score, values.mean(0)) for name, values in measured.items()}
    resampled = {
        name: _shares(effects, score, bootstrap_means(values, draws, generator))
        for name, values in measured.items()
    }
    exact = means["memorized"] - means["control"]
    differences = resampled["memorized"] - resampled["control"]
    bounds, ranks = interval(differences), rank_intervals(exact, differences).float()
    memorized, control = (
        values if score == "effect" else _shares(effects, score, values, of=values.mean(0))
        for values in measured.values()
    )
    if min(len(memorized), len(control)) < 2:
        bounds, ranks = (torch.full_like(x, torch.nan) for x in (bounds, ranks))
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
        score=torch.where(effects.verified, effects.on_grid(exact), effects.estimate),
        ci=torch.stack([effects.on_grid(bound) for bound in bounds]),
        p_value=effects.on_grid(p_value, 1.0),
        ranks=torch.stack([effects.on_grid(bound) for bound in ranks]),
        permutations=permutations,
        notes=tuple(notes),
    )


def _columns(effects: ComponentEffects, unit: RankedUnit) -> list[int]:
    """The components of a unit among those that were ablated."""
    return [i for i, component in enumerate(effects.components) if component.unit == unit]


def _measured(
    effects: ComponentEffects, name: str, score: Score
) -> Float[Tensor, "group component"]:
    """What is compared: rises of the NLL, or falls of the margin."""
    samples = effects.samples[name]
    if score == "effect":
        return samples[..., MEASURES.index("nll")]
    return -samples[..., MEASURES.index("margin")]


def _shares(
    effects: ComponentEffects,
    score: Score,
    values: Float[Tensor, "*row component"],
    of: Float[Tensor, " component"] | None = None,
) -> Float[Tensor, "*row component"]:
    """For `interaction`, values divided by the mean over the components of each unit.

    The mean is that of each row, or of the values `of`.
    """
    if score == "effect":
        return values
    shares = torch.empty_like(values)
    for unit in effects.grid.units:
        columns = _columns(effects, unit)
        whole = values if of is None else of
        shares[..., columns] = values[..., columns] / whole[..., columns].mean(-1, keepdim=True)
    return shares


def _check_shares(effects: ComponentEffects, measured: Mapping[str, Tensor]) -> None:
    """Raise `InputError` where a mean effect is not positive: shares of it would mean nothing."""
    for name, values in measured.items():
        for unit in effects.grid.units:
            if not float(values[:, _columns(effects, unit)].mean()) > 0:
                raise InputError(
                    "score",
                    f"'interaction', but no {unit} matters to the {name} paragraphs on average",
                    "compare with text of which the model is sure: control_text='own'",
                )


def _fit_note(test: PermutationTest, unit: RankedUnit) -> list[str]:
    n_fitted = int(test.fitted.sum())
    if not n_fitted:
        return []
    return [
        f"p-values of {n_fitted} {unit}s are from a tail that was fitted to {test.permutations:,} "
        "permutations: so many tests would need more of them than were drawn."
    ]
