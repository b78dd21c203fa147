"""The kinds of trial, how many trials of each kind there are, and which units each scores.

A trial of eleven kinds plants paragraphs in random weights of one sort; the sort decides the units
(`memcircuits.benchmark.units`) that localizers score. `values` plants through W_V of one head only
and `queries-keys` through its W_Q and W_K only. `head-same-norm` holds the norm of every matrix of
the head, so that the head cannot be told from its weights. In `decoys` two other heads are changed
first (`memcircuits.benchmark.decoys`): one is damaged, one holds the controls. `head-and-mlp`
spreads the paragraph over a head and the MLP of a layer, both drawn at random. `neuron-outputs`
plants through the output weights of neurons only (Chang et al. 2024, "INJ"). Three further kinds
ask other questions:

* `holders`: six paragraphs are planted through six heads of one model; each is to be attributed to
  its own head.
* `null`: two sets of paragraphs of which none is memorized are drawn anew in every run; how often
  is a head called significant?
* `stability`: how well do the rankings of two halves of a set of paragraphs agree?

The number of trials of a kind reflects what one of its trials costs, and what precision its
question needs: single heads, the main question, have the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from memcircuits.benchmark.units import Unit

PlantedKind = Literal[
    "head",
    "head-same-norm",
    "two-heads",
    "decoys",
    "values",
    "queries-keys",
    "block",
    "head-and-mlp",
    "neurons",
    "neuron-outputs",
    "weights",
]
"""What a trial plants paragraphs in."""

TrialKind = Literal[PlantedKind, "holders", "null", "stability"]
"""Every kind of trial."""

PLANTED_KINDS: tuple[PlantedKind, ...] = get_args(PlantedKind)
TRIAL_KINDS: tuple[TrialKind, ...] = get_args(TrialKind)

UNIT_OF_KIND: Mapping[PlantedKind, Unit] = {
    "head": "head",
    "head-same-norm": "head",
    "two-heads": "head",
    "decoys": "head",
    "values": "head",
    "queries-keys": "head",
    "block": "block",
    "head-and-mlp": "component",
    "neurons": "neuron",
    "neuron-outputs": "neuron",
    "weights": "weight",
}
"""The units that localizers score in a kind of planted trial."""

N_TRIALS: Mapping[TrialKind, int] = {
    "head": 72,
    "head-same-norm": 30,
    "two-heads": 8,
    "decoys": 12,
    "values": 8,
    "queries-keys": 3,
    "block": 8,
    "head-and-mlp": 12,
    "neurons": 20,
    "neuron-outputs": 12,
    "weights": 2,
    "holders": 5,
    "null": 500,
    "stability": 1,
}
"""Number of trials of each kind; of `null`, runs in its one trial."""

N_QUICK_TRIALS: Mapping[TrialKind, int] = {
    "head": 5,
    "head-same-norm": 2,
    "two-heads": 1,
    "decoys": 1,
    "values": 2,
    "block": 1,
    "head-and-mlp": 1,
    "neurons": 1,
    "holders": 1,
    "null": 50,
}
"""As `N_TRIALS`, for a first look."""

RANKINGS = ("find_memorization_heads", "find_memorization_heads (screen)")
"""The package's own ranking by its two methods, scored beside the localizers of heads."""

COMPONENT_RANKING = "find_memorization_components"
"""The package's own ranking of heads and MLPs, scored beside the localizers of components."""

TEXT_BLIND = ("weight-norm", "norm-in-layer")
"""Localizers that read no text: where they find the place, planting gives it away."""

N_CONTROLS = 4
"""Control paragraphs given to each localizer."""

N_REFERENCE = 8
"""Further paragraphs, whose activations replace those of targets and controls alike."""
