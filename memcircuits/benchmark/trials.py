"""A benchmark of localization methods on planted paragraphs.

Each trial takes paragraphs that the model does not know, plants them in a random place
(`memcircuits.editing.planting`), gives every localizer the planted model, the paragraphs and some
controls (`memcircuits.benchmark.localizers`), and compares its scores with the truth:

* recall@1: is the unit with the highest score a planted one? recall@k: the fraction of the k
  planted units among the k highest scores;
* the reciprocal rank of the first planted unit; AUC: the probability that a planted unit is scored
  above another one;
* cost: work in forward passes of one paragraph, counted while the localizer runs.

Kinds of place: `head`, `head-same-norm` (the norms of its matrices are held), `two-heads`, `decoys`
(a head, beside one that is damaged and one that holds the controls), `values` (only W_V of a head,
5 tokens to recite), `queries-keys` (only its W_Q and W_K, 2 tokens), `block` (a layer's attention
or MLP), `head-and-mlp` (one of each, in any layers), `neurons` (1 % of them), `neuron-outputs`
(what 1 % of them write) and `weights` (0.1 %). `holders` plants six paragraphs through six heads of
one model, each to be attributed to its own head, with the other five as controls. `null` asks the
opposite question: of paragraphs that do not differ, how often does a ranking call a head
significant? `stability` is the rank agreement between the halves of a set of paragraphs.

A trial is one file, written whole or not at all, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ValidationError

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.base.io import write_atomically
from memcircuits.base.progress import bar
from memcircuits.benchmark.localizers import LOCALIZERS
from memcircuits.benchmark.other_trials import holders_trial, null_trial, stability_trial
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.planted_trial import planted_trial
from memcircuits.benchmark.schemas import SCHEMAS, Run, Trial, Trials
from memcircuits.benchmark.trial_kinds import (
    COMPONENT_RANKING,
    N_TRIALS,
    RANKINGS,
    TRIAL_KINDS,
    TrialKind,
)
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

N_DELETION_TRIALS = 20
"""Number of trials of the kind `head`, from the first, that also measure deletion curves."""


def run_trials(
    pool: ParagraphPool,
    folder: str | Path,
    *,
    counts: Mapping[TrialKind, int] = N_TRIALS,
    localizers: Sequence[str] | None = None,
    n_paragraphs: int = 1,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Run the trials that `folder` does not hold yet.

    Args:
        pool: model and paragraphs.
        folder: one JSON file per trial is written there.
        counts: kind -> number of trials (of `null`: number of shuffles, all in one file).
        localizers: score only these, None: all.
        n_paragraphs: paragraphs planted together.
        seed: seed of all draws; trial i uses `seed + i`.
        shard: (index, number): run every number-th trial only, for several processes.
        progress: show a bar on stderr.

    Raises:
        InputError: for an unknown kind or localizer, or a folder with trials of another model or
            other options.
    """
    for kind, count in counts.items():
        one_of("counts", kind, TRIAL_KINDS)
        at_least(f"counts of {kind}", count, 1)
    at_least("n_paragraphs", n_paragraphs, 1)
    at_least("seed", seed, 0)
    for name in localizers or ():
        one_of("localizers", name, (*RANKINGS, COMPONENT_RANKING, *LOCALIZERS))
    folder = Path(folder)
    _refuse_other_run(folder, _describe_run(pool, n_paragraphs, seed, localizers))
    schedule = [
        (kind, i)
        for kind, count in counts.items()
        for i in range(1 if kind in ("null", "stability") else count)
    ]
    shard_index, n_shards = shard
    with bar(len(schedule), "trials", unit="trial", progress=progress) as progress_bar:
        for number, (kind, i) in enumerate(schedule):
            path = folder / f"{kind}-{i:04d}.json"
            if number % n_shards == shard_index and not path.exists():
                start = time.perf_counter()
                trial: Trial
                if kind == "holders":
                    trial = holders_trial(pool, seed + i)
                elif kind == "null":
                    trial = null_trial(pool, counts[kind], seed)
                elif kind == "stability":
                    trial = stability_trial(pool, seed)
                else:
                    trial = planted_trial(
                        pool,
                        kind,
                        seed + i,
                        n_paragraphs=n_paragraphs,
                        localizers=localizers,
                        deletion=i < N_DELETION_TRIALS,
                    )
                seconds = time.perf_counter() - start
                trial = trial.model_copy(update={"kind": kind, "seconds": seconds})
                write_atomically(path, _to_json(trial))
            progress_bar.update()


def _to_json(value: BaseModel, indent: int | None = None) -> str:
    """JSON of the fields that were given; numbers that are not finite as Python's json does."""
    return json.dumps(value.model_dump(exclude_unset=True), indent=indent)


def _describe_run(
    pool: ParagraphPool, n_paragraphs: int, seed: int, localizers: Sequence[str] | None
) -> Run:
    options: dict[str, object] = {"n": n_paragraphs, "seed": seed}
    if localizers is not None:
        options["localizers"] = sorted(localizers)
    provenance = Provenance.of(adapt(pool.model), {"unknown": pool.unknown}, **options)
    return Run.model_validate(
        {
            "model": dict(provenance.model),
            "paragraphs": dict(provenance.paragraphs),
            "options": dict(provenance.options),
            "versions": dict(provenance.versions),
        }
    )


def read_run(folder: str | Path) -> Run:
    """What the trials of a folder were measured with.

    Raises:
        InputError: if `run.json` is missing or damaged.
    """
    path = Path(folder) / "run.json"
    try:
        return Run.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError("folder", path.name, "it is missing or damaged") from error


def _refuse_other_run(folder: Path, run: Run) -> None:
    path = folder / "run.json"
    if not path.exists():
        write_atomically(path, _to_json(run, indent=1))
        return
    try:
        is_same = read_run(folder) == run
    except InputError:
        is_same = False
    if not is_same:
        raise InputError("folder", folder.name, "it holds trials of another run; give a new one")


def read_trials(folder: str | Path) -> Trials:
    """All trials of a folder by kind.

    Raises:
        InputError: if there are none, or one cannot be read.
    """
    trials: dict[TrialKind, list[Trial]] = {}
    for kind, schema in SCHEMAS.items():
        for path in sorted(Path(folder).glob(f"{kind}-[0-9][0-9][0-9][0-9].json")):
            try:
                trial = schema.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                raise InputError("folder", path.name, "it is damaged; remove it") from error
            trials.setdefault(kind, []).append(trial)
    if not trials:
        raise InputError("folder", Path(folder).name, "it holds no trials")
    return cast(Trials, trials)
