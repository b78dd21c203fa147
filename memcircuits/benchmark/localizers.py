"""Many methods, one signature: which parts of the model hold these paragraphs?

A localizer takes a `LocalizationTask` (a model, target paragraphs, controls) and answers one score per unit,
larger for parts that it blames more. Units are *heads*, *blocks* (a layer's attention or MLP), MLP
*neurons* and single *weights*. Where a method can tell targets from controls, the score is the
difference: what harms every paragraph alike is not where these are kept.

| family | localizers |
| --- | --- |
| gradients of weights | `gradient-max` (the paper), `gradient-mean`, `gradient-l2`,
  `gradient-fisher` (with the controls' curvature, `memcircuits.evidence.gradients.parameters`), `gradient-x-weight` |
| gradients of activations | `activation-gradient`, `attribution`, `integrated-gradients` |
| ablation | `zero-ablation`, `mean-ablation`, `resample-ablation` |
| patching against perturbed twins | `exact-patching`, `attribution-patching` |
| attention | `rare-token-attention` |
| learned | `hard-concrete`: a sparse mask of units that keeps the recitation (Louizos et al. 2018,
  as used by Chang et al. 2024) |
| bounds | `oracle` (what planting changed) and `random` |

`memcircuits.benchmark.trials` scores them on planted paragraphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from memcircuits.benchmark.by_gates import (
    by_activation_gradient,
    by_attribution,
    by_hard_concrete,
    by_integrated_gradients,
)
from memcircuits.benchmark.by_interventions import by_ablation, by_attention, by_patching
from memcircuits.benchmark.by_weights import (
    by_fisher,
    by_gradient,
    by_product,
    oracle,
    random_scores,
)
from memcircuits.benchmark.units import UNITS, LocalizationTask
from memcircuits.core.errors import InputError, one_of


@dataclass(frozen=True)
class Localizer:
    """A method.

    Attributes:
        name: what it is called.
        units: the units that it can score.
        score: from a case and a unit to one score per unit, flat (see `size`).
    """

    name: str
    units: tuple[str, ...]
    score: Callable[[LocalizationTask, str], Float[Tensor, " unit"]]


def localize(case: LocalizationTask, name: str, unit: str = "head") -> Float[Tensor, " unit"]:
    """Run one localizer.

    Args:
        case: model and paragraphs.
        name: of the localizer (`LOCALIZERS`).
        unit: `head` ([layer, head] flattened), `block` (each layer's attention, then its MLP),
            `neuron` (layer by layer) or `weight` (matrix by matrix, as `Adapter.weights`).

    Raises:
        InputError: for an unknown name, or a unit that it cannot score.
    """
    one_of("localizer", name, LOCALIZERS)
    one_of("unit", unit, UNITS)
    if unit not in LOCALIZERS[name].units:
        able = [n for n, found in LOCALIZERS.items() if unit in found.units]
        raise InputError("unit", repr(unit), f"{name} cannot score it; {', '.join(able)} can")
    return LOCALIZERS[name].score(case, unit).detach().float().cpu().flatten()


LOCALIZERS: Mapping[str, Localizer] = {
    found.name: found
    for found in (
        Localizer("gradient-max", UNITS, partial(by_gradient, "max")),
        Localizer("gradient-mean", UNITS, partial(by_gradient, "mean")),
        Localizer("gradient-l2", UNITS, partial(by_gradient, "l2")),
        Localizer("gradient-fisher", UNITS, by_fisher),
        Localizer("gradient-x-weight", UNITS, by_product),
        Localizer("activation-gradient", ("head", "neuron"), by_activation_gradient),
        Localizer("attribution", ("head", "neuron"), by_attribution),
        Localizer("integrated-gradients", ("head", "neuron"), by_integrated_gradients),
        Localizer("hard-concrete", ("head", "neuron"), by_hard_concrete),
        Localizer("zero-ablation", ("head", "block"), partial(by_ablation, "zero")),
        Localizer("mean-ablation", ("head",), partial(by_ablation, "mean")),
        Localizer("resample-ablation", ("head",), partial(by_ablation, "resample")),
        Localizer("exact-patching", ("head",), partial(by_patching, "exact")),
        Localizer("attribution-patching", ("head",), partial(by_patching, "attribution")),
        Localizer("rare-token-attention", ("head",), by_attention),
        Localizer("oracle", UNITS, oracle),
        Localizer("random", UNITS, random_scores),
    )
}
