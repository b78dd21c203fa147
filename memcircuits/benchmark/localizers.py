"""Localization methods with one signature: which parts of the model hold these paragraphs?

A localizer takes a `LocalizationTask` (a model, target paragraphs, controls) and returns one score
per unit, higher for units that it considers more responsible. Units are *heads*, *blocks* (a
layer's attention or MLP), *components* (heads and MLPs), MLP *neurons* and single *weights*. Where
a method can compare targets with controls, the score is the difference: a unit that all paragraphs
need does not hold the targets.

| family | localizers |
| --- | --- |
| gradients of weights | `gradient-max` (the paper), `gradient-mean`, `gradient-l2`,
  `gradient-fisher` (scaled by the Fisher information of the controls), `gradient-x-weight` |
| gradients of activations | `activation-gradient`, `attribution`, `log-odds-attribution` (not
  flat where the recitation is certain), `attn-lrp`, `integrated-gradients` |
| ablation | `zero-ablation`, `mean-ablation`, `resample-ablation` |
| patching between clean and corrupted prompts | `exact-patching`, `attribution-patching` |
| attention | `rare-token-attention` |
| learned | `hard-concrete`: a sparse mask of units that keeps the recitation (Louizos et al. 2018,
  as used by Chang et al. 2024) |
| blind to the text | `weight-norm`, `norm-in-layer`: does planting give the place away? |
| bounds | `oracle` (what planting changed) and `random` |

`memcircuits.benchmark.trials` scores them on planted paragraphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.benchmark.by_activations import (
    by_activation_gradient,
    by_attribution,
    by_hard_concrete,
    by_integrated_gradients,
    by_relevance,
)
from memcircuits.benchmark.by_interventions import by_ablation, by_attention, by_patching
from memcircuits.benchmark.by_weights import (
    by_fisher,
    by_gradient,
    by_norm,
    by_norm_in_layer,
    by_product,
    oracle,
    random_scores,
)
from memcircuits.benchmark.units import UNITS, LocalizationTask, Unit


@dataclass(frozen=True)
class Localizer:
    """A localization method.

    Attributes:
        name: its name in `LOCALIZERS` and in the tables.
        units: the units that it can score.
        score: function from a task and a unit to one score per unit.
    """

    name: str
    units: tuple[Unit, ...]
    score: Callable[[LocalizationTask, Unit], Float[Tensor, "*unit"]]


def localize(task: LocalizationTask, name: str, unit: Unit = "head") -> Float[Tensor, " unit"]:
    """Run one localizer.

    Args:
        task: model and paragraphs.
        name: name of the localizer (`LOCALIZERS`).
        unit: `head` ([layer, head] flattened), `block` (each layer's attention, then its MLP),
            `component` (all heads, then the MLPs), `neuron` (layer by layer) or `weight` (matrix by
            matrix, as `Adapter.weights`).

    Returns:
        One score per unit, float32, on the CPU.

    Raises:
        InputError: for an unknown localizer, or a unit that it cannot score.
    """
    one_of("localizer", name, LOCALIZERS)
    one_of("unit", unit, UNITS)
    if unit not in LOCALIZERS[name].units:
        able = ", ".join(localizers_of(unit))
        raise InputError("unit", repr(unit), f"{name} cannot score it; {able} can")
    return LOCALIZERS[name].score(task, unit).detach().float().cpu().flatten()


def localizers_of(unit: Unit) -> list[str]:
    """Names of the localizers that can score a unit."""
    return [name for name, localizer in LOCALIZERS.items() if unit in localizer.units]


_LOCALIZERS = (
    Localizer("gradient-max", UNITS, partial(by_gradient, "max")),
    Localizer("gradient-mean", UNITS, partial(by_gradient, "mean")),
    Localizer("gradient-l2", UNITS, partial(by_gradient, "l2")),
    Localizer("gradient-fisher", UNITS, by_fisher),
    Localizer("gradient-x-weight", UNITS, by_product),
    Localizer("activation-gradient", ("head", "neuron"), by_activation_gradient),
    Localizer("attribution", ("head", "component", "neuron"), partial(by_attribution, "nll")),
    Localizer(
        "log-odds-attribution",
        ("head", "component", "neuron"),
        partial(by_attribution, "log-odds"),
    ),
    Localizer("attn-lrp", ("head", "component", "neuron"), by_relevance),
    Localizer("integrated-gradients", ("head", "component", "neuron"), by_integrated_gradients),
    Localizer("hard-concrete", ("head", "component", "neuron"), by_hard_concrete),
    Localizer("zero-ablation", ("head", "block", "component"), partial(by_ablation, "zero")),
    Localizer("mean-ablation", ("head",), partial(by_ablation, "mean")),
    Localizer("resample-ablation", ("head",), partial(by_ablation, "resample")),
    Localizer("exact-patching", ("head",), partial(by_patching, "exact")),
    Localizer("attribution-patching", ("head",), partial(by_patching, "attribution")),
    Localizer("rare-token-attention", ("head",), by_attention),
    Localizer("weight-norm", UNITS, by_norm),
    Localizer("norm-in-layer", ("head", "neuron", "weight"), by_norm_in_layer),
    Localizer("oracle", UNITS, oracle),
    Localizer("random", UNITS, random_scores),
)

LOCALIZERS: Mapping[str, Localizer] = {localizer.name: localizer for localizer in _LOCALIZERS}
