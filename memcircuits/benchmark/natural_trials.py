"""Trials on trained memory: localizers, and what transplants between twins say is true.

Two models were trained alike, but for some paragraphs: `model` on `own`, `twin` on `other`, neither
on `neither`. A trial takes a few paragraphs that one of them recites in full and the other does
not. Every localizer is given that model, the paragraphs and controls among `neither`, and scores
all heads; the truth is what the transplant of each head's weights does
(`memcircuits.evidence.transplants`). Both directions are measured: `model`, and `twin` with the
roles exchanged.

Beside the localizers stand references, which show how high and how low a score can be:

* `other truth`: sufficiency where necessity is the truth, and the reverse;
* `activations`: necessity of each head's activations instead of its weights;
* `noise twin`: necessity against a twin trained on the *same* paragraphs in another order; what
  agrees with the truth no better than this was not shown to find memory;
* `weight change`: norm of the difference of the head's weights, which no user has without a twin;
* `weight norm`: norm of the head's weights, which has seen no text;
* `ablation in the twin`: zero ablation in the model that does not know the text.

Trials are files, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.base.io import write_atomically
from memcircuits.base.progress import bar
from memcircuits.benchmark.localizers import LOCALIZERS, localizers_of
from memcircuits.benchmark.planted_trial import scores_of
from memcircuits.benchmark.trial_kinds import N_REFERENCE, RANKINGS
from memcircuits.benchmark.units import LocalizationTask, count_forwards, pool_scores
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.ablation import ablate_heads
from memcircuits.evidence.transplants.sweep import transplant
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt

Direction = Literal["model", "twin"]
"""Whose memory is localized."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

REFERENCES = (
    "other truth",
    "activations",
    "noise twin",
    "weight change",
    "weight norm",
    "ablation in the twin",
)
"""Scores that are no localizers: what they know, or do not know, is said above."""

ROLES = ("organism", "twin", "neither")
"""Which of the two models was trained on a paragraph: `model`, `twin` or none."""

LOWEST_EM = 0.1  # of the continuation: the other model recites at most so much of a paragraph


@dataclass(frozen=True)
class Twins:
    """Two models, and the paragraphs that tell them apart.

    Attributes:
        model: trained on `own`.
        twin: trained on `other`.
        own: paragraphs that only the model was trained on.
        other: paragraphs that only the twin was trained on.
        neither: paragraphs that neither was trained on, from which controls are drawn.
        noise: a model trained on the paragraphs of `model` in another order, if there is one.
        unigrams: token counts of the training text, if known.
    """

    model: Model
    twin: Model
    own: Paragraphs
    other: Paragraphs
    neither: Paragraphs
    noise: Model | None = None
    unigrams: UnigramTable | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        twin: Model,
        paragraphs: Paragraphs,
        *,
        noise: Model | None = None,
        unigrams: UnigramTable | None = None,
    ) -> Twins:
        """Sort paragraphs by their column `role`, or without one by which model recites them.

        Args:
            model: one model.
            twin: the other.
            paragraphs: with a column `role` of `organism` (only the model was trained on it),
                `twin` and `neither`; other roles are left out. Without that column a paragraph
                belongs to the model that recites it in full if the other recites at most a tenth,
                and to neither if none recites more than that.
            noise: see `Twins`.
            unigrams: see `Twins`.

        Raises:
            InputError: if one of the three sets is empty.
        """
        roles: Sequence[object] = paragraphs.metadata.get("role", ())
        if not set(ROLES) <= set(roles):
            em, em_twin = (scan(m, paragraphs, progress=False).em for m in (model, twin))
            n = paragraphs.n_continuation
            low, low_twin = em <= LOWEST_EM * n, em_twin <= LOWEST_EM * n
            names = [(em == n) & low_twin, (em_twin == n) & low, low & low_twin]
            rows = {role: chosen.tolist() for role, chosen in zip(ROLES, names, strict=True)}
        else:
            rows = {role: [r == role for r in roles] for role in ROLES}
        empty = [role for role in ROLES if not any(rows[role])]
        if empty:
            raise InputError(
                "paragraphs",
                f"none of {len(paragraphs)} has the role {empty[0]}",
                "give paragraphs that only the model knows, only the twin, and neither",
            )
        own, other, neither = (paragraphs[torch.tensor(rows[role])] for role in ROLES)
        return cls(model, twin, own, other, neither, noise, unigrams)

    def side(self, direction: Direction) -> tuple[Model, Model, Paragraphs]:
        """The model whose memory is localized, its twin, and the paragraphs it should know."""
        if direction == "model":
            return self.model, self.twin, self.own
        return self.twin, self.model, self.other


class NaturalTrial(BaseModel):
    """The file of one trial; all maps are over heads, by layer and head.

    Attributes:
        direction: whose memory was localized.
        paragraphs: names of the paragraphs.
        total: mean NLL of the other model minus that of this one, nats/token.
        necessity: rise of the NLL with the other model's head, nats/token.
        sufficiency: fall of the other model's NLL with this model's head, nats/token.
        scores: localizer or reference -> its score of each head.
        forwards: localizer -> cost, in forward passes of one paragraph.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    direction: Direction
    paragraphs: list[str]
    total: float
    necessity: list[float]
    sufficiency: list[float]
    scores: dict[str, list[float]]
    forwards: dict[str, float]


def told_apart(knows: Model, other: Model, paragraphs: Paragraphs) -> Paragraphs:
    """Paragraphs that one model recites in full, and the other at most a tenth of.

    Raises:
        InputError: if there are none.
    """
    em, em_other = (scan(model, paragraphs, progress=False).em for model in (knows, other))
    n = paragraphs.n_continuation
    chosen = (em == n) & (em_other <= LOWEST_EM * n)
    if not chosen.any():
        raise InputError(
            "paragraphs",
            f"none of {len(paragraphs)} is recited by one model and unknown to the other",
            "give paragraphs that only one of them was trained on",
        )
    return paragraphs[chosen]


def run_natural_trials(
    twins: Twins,
    folder: str | Path,
    *,
    n_trials: int = 8,
    n_paragraphs: int = 4,
    n_controls: int = 16,
    localizers: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Run the trials that `folder` does not hold yet.

    Args:
        twins: models and paragraphs.
        folder: one JSON file per trial is written there.
        n_trials: trials in each direction, at most as many as there are paragraphs for.
        n_paragraphs: paragraphs of each trial; no paragraph is in two trials.
        n_controls: controls of each trial.
        localizers: score only these, None: all.
        seed: seed of all draws.
        progress: show a bar on stderr.

    Raises:
        InputError: for an unknown localizer, too few paragraphs, or a wrong number.
    """
    for name, value in (("n_trials", n_trials), ("n_paragraphs", n_paragraphs)):
        at_least(name, value, 1)
    at_least("n_controls", n_controls, 2)
    for localizer in localizers or ():
        one_of("localizers", localizer, (*RANKINGS, *LOCALIZERS))
    folder = Path(folder)
    with bar(2 * n_trials, "trials", unit="trial", progress=progress) as progress_bar:
        for direction in DIRECTIONS:
            model, other, paragraphs = twins.side(direction)
            known = told_apart(model, other, paragraphs)
            order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
            for i, rows in enumerate(order.split(n_paragraphs)[:n_trials]):
                path = folder / f"natural-{direction}-{i:04d}.json"
                if not path.exists():
                    generator = torch.Generator().manual_seed(seed + i)
                    controls, reference = _draw_unknown(twins.neither, n_controls, generator)
                    trial = natural_trial(
                        twins,
                        direction,
                        known[rows],
                        controls,
                        reference,
                        localizers=localizers,
                        seed=seed + i,
                    )
                    write_atomically(path, trial.model_dump_json(indent=1))
                progress_bar.update()


def _draw_unknown(
    neither: Paragraphs, n_controls: int, generator: torch.Generator
) -> tuple[Paragraphs, Paragraphs]:
    """Controls, and a reference of other paragraphs: at most half of those drawn."""
    drawn = neither.sample(n_controls + N_REFERENCE, generator)
    order = torch.randperm(len(drawn), generator=generator)
    n_reference = min(N_REFERENCE, len(drawn) // 2)
    return drawn[order[n_reference:]], drawn[order[:n_reference]]


def natural_trial(
    twins: Twins,
    direction: Direction,
    targets: Paragraphs,
    controls: Paragraphs,
    reference: Paragraphs,
    *,
    localizers: Sequence[str] | None = None,
    seed: int = 0,
) -> NaturalTrial:
    """Carry out one trial.

    Args:
        twins: the models.
        direction: whose memory is localized.
        targets: paragraphs that this model recites and the other does not.
        controls: paragraphs that neither knows.
        reference: further such paragraphs, see `LocalizationTask`.
        localizers: score only these, None: all that score heads but the oracle.
        seed: seed of all draws.
    """
    model, other, _ = twins.side(direction)
    truth = transplant(model, other, targets, units=["head"], progress=False)
    scores = {
        name: _flat(values) for name, values in _references(twins, direction, targets).items()
    }
    forwards: dict[str, float] = {}
    task = LocalizationTask(model, targets, controls, twins.unigrams, seed, reference=reference)
    names = [*RANKINGS[:1], *(name for name in localizers_of("head") if name != "oracle")]
    for name in names:
        if localizers is None or name in localizers:
            with count_forwards(task.adapter) as cost:
                scores[name] = _flat(scores_of(task, name, "head"))
            forwards[name] = cost["forwards"]
    return NaturalTrial(
        direction=direction,
        paragraphs=list(targets.names),
        total=truth.total,
        necessity=_flat(truth.map("necessity").values),
        sufficiency=_flat(truth.map("sufficiency").values),
        scores=scores,
        forwards=forwards,
    )


def _flat(values: Tensor) -> list[float]:
    return [round(value, 7) for value in values.flatten().tolist()]


def _references(
    twins: Twins, direction: Direction, targets: Paragraphs
) -> dict[str, Float[Tensor, "..."]]:
    """The references that can be computed; `other truth` is in every trial already."""
    model, other, _ = twins.side(direction)
    used = transplant(model, other, targets, patched="activations", units=["head"], progress=False)
    adapter, other_adapter = adapt(model), adapt(other)
    norms = [weight.values.detach() for weight in adapter.weights()]
    changes = [
        ours - theirs.values.to(ours.device)
        for ours, theirs in zip(norms, other_adapter.weights(), strict=True)
    ]
    references = {
        "activations": used.map().values,
        "weight change": pool_scores(adapter, changes, "head", "l2"),
        "weight norm": pool_scores(adapter, norms, "head", "l2"),
        "ablation in the twin": ablate_heads(other, targets, progress=False).values,
    }
    if twins.noise is not None and direction == "model":
        floor = transplant(model, twins.noise, targets, units=["head"], progress=False)
        references["noise twin"] = floor.map().values
    return references


def read_natural_trials(folder: str | Path) -> list[NaturalTrial]:
    """All trials of a folder.

    Raises:
        InputError: if there are none, or one cannot be read.
    """
    trials = []
    for path in sorted(Path(folder).glob("natural-*-[0-9][0-9][0-9][0-9].json")):
        try:
            trials.append(NaturalTrial.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise InputError("folder", path.name, "it is damaged; remove it") from error
    if not trials:
        raise InputError("folder", Path(folder).name, "it holds no trials")
    return trials
