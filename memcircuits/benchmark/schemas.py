"""The files of a benchmark's folder: one JSON file per trial, and `run.json`.

Each kind of trial is a pydantic model; its fields are the keys of the file. Reading validates
strictly (a number is not read from text), so that the tables can rely on what they aggregate; keys
that a model does not know are ignored. `seconds` is the duration of the whole trial.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memcircuits.benchmark.trial_kinds import PLANTED_KINDS, TrialKind
from memcircuits.benchmark.units import Unit

Proportion = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Trial(_Schema):
    """What every trial's file says.

    Attributes:
        kind: the kind of trial.
        seconds: duration.
    """

    kind: TrialKind | None = None
    seconds: float = 0.0


class LocalizerScore(_Schema):
    """How well one localizer found the planted units, as `memcircuits.benchmark.metrics` says.

    Attributes:
        localizer: its name.
        unit: the units scored.
        recall_at_1: see `Metrics`.
        recall_at_k: see `Metrics`.
        mrr: see `Metrics`.
        auc: see `Metrics`.
        k: number of planted units.
        units: number of all units.
        forwards: cost, in forward passes of one paragraph.
        wall: cost in seconds.
        scores: the score of each head; absent for other units.
        first: the head with the highest score; absent for other units.
    """

    localizer: str
    unit: Unit
    recall_at_1: Proportion
    recall_at_k: Proportion
    mrr: Proportion
    auc: Proportion
    k: Count = 0
    units: Count = 0
    forwards: float
    wall: float = 0.0
    scores: list[float] | None = None
    first: str | None = None

    @model_validator(mode="after")
    def _heads_have_scores(self) -> LocalizerScore:
        if self.unit == "head" and not self.scores:
            raise ValueError("the scores of the heads are missing")
        return self


class DeletionScore(_Schema):
    """EM as a fraction of the continuation when the head ranked first is ablated.

    Attributes:
        localizer: the localizer that ranked the heads.
        targets: of the targets.
        others: of other paragraphs, which the planted model recites in full.
    """

    localizer: str
    targets: Proportion
    others: Proportion


class PlantingSummary(_Schema):
    """How planting went.

    Attributes:
        steps: steps of the optimizer.
        kl: KL(original || planted) on held-out anchors, nats/token.
        seconds: duration.
    """

    steps: int
    kl: float
    seconds: float


class PlantedTrial(Trial):
    """Paragraphs planted in a random place, and how well each localizer found it.

    Attributes:
        seed: seed of all draws.
        where: the places, as `plant` takes them.
        decoys: heads that were changed before, see `memcircuits.benchmark.decoys`.
        failed: why the paragraphs could not be planted there, or None.
        planted: how planting went; None if it failed.
        results: one entry for each localizer; empty if planting failed.
        deletions: of some trials of the kind `head`, what is recited without the head ranked first.
    """

    seed: int | None = None
    where: list[str]
    decoys: list[str] = []
    failed: str | None
    planted: PlantingSummary | None = None
    results: list[LocalizerScore] = []
    deletions: list[DeletionScore] = []


class Assignment(_Schema):
    """Which head a ranking attributes a paragraph to.

    Attributes:
        method: method of the ranking, `exact` or `screen`.
        holder: the head that the paragraph was planted through.
        first: the head with the highest score.
        among_holders: the holder, of all paragraphs' holders, with the highest score.
    """

    method: str
    holder: str
    first: str
    among_holders: str


class HoldersTrial(Trial):
    """Several paragraphs planted through one head each, and the heads they were attributed to.

    Attributes:
        seed: seed of all draws.
        em: tokens of each paragraph recited once all are planted.
        assigned: one entry for each method and each paragraph that is still recited in full.
        planted: number of paragraphs that could be planted.
    """

    seed: int | None = None
    em: list[int] = []
    assigned: list[Assignment]
    planted: Count


class NullResult(_Schema):
    """How often a head was called significant though neither set is memorized more than the other.

    Attributes:
        paragraphs: number of paragraphs that either set is drawn from.
        nll: mean loss of these paragraphs, nats/token.
        per_side: paragraphs drawn for each of the two sets.
        named: runs in which some head was called significant.
    """

    paragraphs: tuple[Count, Count]
    nll: tuple[float, float]
    per_side: Count
    named: Count


class NullTrial(Trial):
    """Two sets of paragraphs drawn anew many times, and tested as if one were memorized.

    Attributes:
        runs: number of draws of each pair of sets.
        pairs: what the two sets are -> how often a head was named.
    """

    runs: Annotated[int, Field(ge=1)]
    pairs: dict[str, NullResult] = {}

    @model_validator(mode="after")
    def _named_in_some_runs(self) -> NullTrial:
        for result in self.pairs.values():
            if result.named > self.runs:
                raise ValueError(f"a head was named in {result.named} of {self.runs} runs")
        return self


class Agreement(_Schema):
    """Kendall's tau between two scorings of all heads by one localizer.

    Attributes:
        halves: of the two halves of the paragraphs.
        seeds: of the first half with two seeds.
    """

    halves: float
    seeds: float


class StabilityTrial(Trial):
    """Agreement of rankings, nothing planted.

    Attributes:
        agreement: localizer -> its agreement with itself.
        per_half: paragraphs in each half.
    """

    agreement: dict[str, Agreement]
    per_half: Count | None = None


class ModelOfRun(_Schema):
    """The model that a run's trials were measured on, with all that its provenance says."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    name: str
    fingerprint: str


class OptionsOfRun(_Schema):
    """Options that all trials of a run share.

    Attributes:
        n: paragraphs planted together.
        seed: seed of the first trial.
        localizers: the localizers that were scored; None for all.
    """

    n: int
    seed: int
    localizers: list[str] | None = None


class Run(_Schema):
    """`run.json`: what all trials of a folder were measured with.

    Attributes:
        model: the model.
        paragraphs: number, lengths and hash of the paragraphs.
        options: options.
        versions: versions of the packages that decide the numbers.
    """

    model: ModelOfRun
    paragraphs: dict[str, Any] = {}
    options: OptionsOfRun
    versions: dict[str, str] = {}


SCHEMAS: dict[TrialKind, type[Trial]] = {
    **dict.fromkeys(PLANTED_KINDS, PlantedTrial),
    "holders": HoldersTrial,
    "null": NullTrial,
    "stability": StabilityTrial,
}
"""Kind of trial -> what its files hold."""

Trials = TypedDict(
    "Trials",
    {
        "head": list[PlantedTrial],
        "head-same-norm": list[PlantedTrial],
        "two-heads": list[PlantedTrial],
        "decoys": list[PlantedTrial],
        "values": list[PlantedTrial],
        "queries-keys": list[PlantedTrial],
        "block": list[PlantedTrial],
        "head-and-mlp": list[PlantedTrial],
        "neurons": list[PlantedTrial],
        "neuron-outputs": list[PlantedTrial],
        "weights": list[PlantedTrial],
        "holders": list[HoldersTrial],
        "null": list[NullTrial],
        "stability": list[StabilityTrial],
    },
    total=False,
)
"""All trials of a folder by kind; kinds without trials are absent."""
