"""Who finds what was written? A benchmark of localizers on planted paragraphs.

Each trial takes paragraphs that the model does not know, writes them into a random place
(`memcircuits.editing.planting`), gives every localizer the planted model, the paragraphs and some controls
(`memcircuits.benchmark.localizers`), and compares its scores with the truth:

* recall@1: is the first unit one of those written; recall@k: the share of the k written units among
  the first k;
* mean reciprocal rank of the first unit that is right; AUC: the chance that a written unit is
  scored above another one;
* cost: work in forward passes of one paragraph, counted while it runs.

Kinds of truth: `head`, `two-heads`, `values` (only W_V of a head, 5 tokens to recite),
`queries-keys` (only its W_Q and W_K, 2 tokens), `block` (a layer's attention or MLP), `neurons`
(1 % of them) and `weights` (0.1 %). `holders` writes six paragraphs through six heads of one model,
each to be assigned to its own head, with the other five as controls. `null` asks the opposite
question: of paragraphs that do not differ, how often does a ranking call a head significant?
`stability` is the rank agreement between the halves of a set of paragraphs.

A trial is a file, written at once or not at all: a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memcircuits.benchmark.kinds import (
    COUNTS,
    DELETION_TRIALS,
    KINDS,
    METRICS,
    RANKINGS,
    UNIT,
    ParagraphPool,
)
from memcircuits.benchmark.localizers import LOCALIZERS
from memcircuits.benchmark.other_trials import holders_trial, null_trial, stability_trial
from memcircuits.benchmark.planted_trial import planted_trial
from memcircuits.core.errors import InputError, at_least, one_of
from memcircuits.core.io import write_atomically
from memcircuits.core.progress import bar
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


def run_trials(
    pool: ParagraphPool,
    folder: str | Path,
    *,
    counts: Mapping[str, int] = COUNTS,
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
        counts: kind -> number of trials (for `null` of shuffles, all in one file).
        localizers: score only these, None: all.
        n_paragraphs: paragraphs written together.
        seed: of all draws; trial i uses `seed + i`.
        shard: (index, number): run every number-th trial only, for several processes.
        progress: show a bar on stderr.

    Raises:
        InputError: for an unknown kind, or a folder with trials of another model or set-up.
    """
    for kind, count in counts.items():
        one_of("counts", kind, KINDS)
        at_least(f"counts of {kind}", count, 1)
    at_least("n_paragraphs", n_paragraphs, 1)
    at_least("seed", seed, 0)
    for name in localizers or ():
        one_of("localizers", name, (*RANKINGS, *LOCALIZERS))
    adapter = adapt(pool.model)
    _refuse_other_run(Path(folder), _key(adapter, pool, n_paragraphs, seed, localizers))
    todo = [
        (kind, i)
        for kind, count in counts.items()
        for i in range(1 if kind in ("null", "stability") else count)
    ]
    with bar(len(todo), "trials", unit="trial", progress=progress) as shown:
        for number, (kind, i) in enumerate(todo):
            path = Path(folder) / f"{kind}-{i:04d}.json"
            if number % shard[1] == shard[0] and not path.exists():
                start = time.perf_counter()
                if kind == "holders":
                    found = holders_trial(pool, seed + i)
                elif kind == "null":
                    found = null_trial(pool, counts["null"], seed)
                elif kind == "stability":
                    found = stability_trial(pool, seed)
                else:
                    deletion = i < DELETION_TRIALS
                    found = planted_trial(pool, kind, seed + i, n_paragraphs, localizers, deletion)
                found |= {"kind": kind, "seconds": time.perf_counter() - start}
                write_atomically(path, json.dumps(found))
            shown.update()


def _key(
    adapter: Adapter,
    pool: ParagraphPool,
    n_paragraphs: int,
    seed: int,
    localizers: Sequence[str] | None,
) -> dict[str, Any]:
    options: dict[str, Any] = {"n": n_paragraphs, "seed": seed}
    if localizers is not None:
        options["localizers"] = sorted(localizers)
    provenance = Provenance.of(adapter, {"unknown": pool.unknown}, **options)
    return {
        "model": dict(provenance.model),
        "paragraphs": dict(provenance.paragraphs),
        "options": dict(provenance.options),
        "versions": dict(provenance.versions),
    }


def _refuse_other_run(folder: Path, key: dict[str, Any]) -> None:
    path = folder / "run.json"
    if not path.exists():
        write_atomically(path, json.dumps(key, indent=1))
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        held = None
    if held != key:
        raise InputError("folder", folder.name, "it holds trials of another run; give a new one")


def read_trials(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """All trials of a folder by kind.

    Raises:
        InputError: if there are none, or one cannot be read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        for path in sorted(Path(folder).glob(f"{kind}-[0-9][0-9][0-9][0-9].json")):
            try:
                trial = json.loads(path.read_text(encoding="utf-8"))
                _check(trial, kind)
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise InputError("folder", path.name, "it is damaged; remove it") from error
            found.setdefault(kind, []).append(trial)
    if not found:
        raise InputError("folder", Path(folder).name, "it holds no trials")
    return found


def _check(trial: dict[str, Any], kind: str) -> None:
    """Touch all that the tables read; raises TypeError, LookupError ... where it is damaged."""
    numbers = [trial["seconds"]]
    if kind == "null":
        sides = [trial[name] for name in ("unknown", "recited") if name in trial]
        numbers += [side[key] for side in sides for key in ("paragraphs", "per_side", "named")]
        numbers += [range(trial["runs"] + 1).index(side["named"]) for side in sides]
    elif kind == "stability":
        numbers += [tau for method in trial["agreement"].values() for tau in method.values()]
    elif kind == "holders":
        names = [a[key] for a in trial["assigned"] for key in ("method", "holder", "first")]
        " ".join([*names, *(a["among_holders"] for a in trial["assigned"])])
    else:
        " ".join(trial["where"])
        rows = [] if trial["failed"] else trial["results"]
        numbers += [row[key] for row in rows for key in (*METRICS, "forwards")]
        if UNIT[kind] == "head":
            numbers += [score for row in rows for score in row["scores"]]
        " ".join(row["localizer"] for row in rows)
        curves = trial.get("deletion", ())
        numbers += [x for curve in curves for side in ("targets", "others") for x in curve[side]]
        " ".join(curve["localizer"] for curve in curves)
    sum(number + 0.0 for number in numbers)  # float("3") would take text
