"""Who finds what was written? A benchmark of localizers on planted paragraphs.

Each trial takes paragraphs that the model does not know, writes them into a random place
(`memcircuits.planting`), gives every localizer the planted model, the paragraphs and some controls
(`memcircuits.localizers`), and compares its scores with the truth:

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

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.ablation import Ablation
from memcircuits.adapter import Adapter, Head, adapt, hook_z
from memcircuits.checks import InputError, at_least, one_of
from memcircuits.localizers import LOCALIZERS, Case, counting, localize, truth_of
from memcircuits.measure import read_continuation
from memcircuits.paragraphs import Paragraphs
from memcircuits.planting import Planted, plant
from memcircuits.progress import bar
from memcircuits.ranking import SIGNIFICANCE, find_memorization_heads
from memcircuits.results import Provenance, write_atomically
from memcircuits.scanning import scan
from memcircuits.statistics import benjamini_hochberg, bootstrap_means, permuted_differences
from memcircuits.unigrams import UnigramTable

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

UNIT = {
    "head": "head",
    "two-heads": "head",
    "values": "head",
    "queries-keys": "head",
    "block": "block",
    "neurons": "neuron",
    "weights": "weight",
}
KINDS = (*UNIT, "holders", "null", "stability")
COUNTS = {
    "head": 106,
    "two-heads": 20,
    "values": 20,
    "queries-keys": 6,
    "block": 8,
    "neurons": 5,
    "weights": 3,
    "holders": 6,
    "null": 2000,
    "stability": 1,
}
QUICK = {"head": 5, "two-heads": 1, "values": 2, "block": 1, "neurons": 1, "holders": 1, "null": 50}
METRICS = ("recall_at_1", "recall_at_k", "mrr", "auc")
RANKINGS = ("find_memorization_heads", "find_memorization_heads (screen)")
_CONTROLS = 4
_HOLDERS = 6
_DELETED = (0, 1, 2, 4)  # heads ablated together
_DEL_TRIALS = 20
_OTHERS = 2  # recited paragraphs beside the targets in a deletion curve
# With 50 tokens no head can hold the text in its values alone, nor one in its queries and keys.
_TOKENS = {"values": 5, "queries-keys": 2}  # of the continuation, all of them elsewhere
_STEPS = {"weights": 400}  # of planting, 150 elsewhere; a place that needs more is left out


@dataclass(frozen=True)
class Pool:
    """Where trials take their paragraphs from.

    Attributes:
        model: HookedTransformer or TransformerBridge.
        unknown: paragraphs that the model does not recite.
        recited: paragraphs that it recites, or None: the others of a deletion curve.
        unigrams: token counts.
    """

    model: Any
    unknown: Paragraphs
    recited: Paragraphs | None
    unigrams: UnigramTable | None

    @classmethod
    def of(cls, model: Any, paragraphs: Any, unigrams: UnigramTable | None = None) -> Pool:
        """Sort paragraphs by what the model does with them.

        Raises:
            InputError: if too few are unknown to it.
        """
        found = scan(model, Paragraphs.of(paragraphs, model), progress=False)
        unknown = found.control
        if unknown is None or len(unknown) < 60:
            n = 0 if unknown is None else len(unknown)
            raise InputError("paragraphs", f"{n} not recited", "a trial needs at least 60 of them")
        return cls(model, unknown, found.memorized, unigrams)

    def draw(self, generator: torch.Generator, *sizes: int) -> list[Paragraphs]:
        """Disjoint random sets of unknown paragraphs; the last one takes up to 40 of the rest."""
        order = torch.randperm(len(self.unknown), generator=generator)
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        sets = [self.unknown[order[a:b]] for a, b in pairwise(ends)]
        return [*sets, self.unknown[order[ends[-1] : ends[-1] + 40]]]


def run_trials(
    pool: Pool,
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
                    found = _holders(pool, seed + i)
                elif kind == "null":
                    found = _null(pool, counts["null"], seed)
                elif kind == "stability":
                    found = _stability(pool, seed)
                else:
                    deletion = i < _DEL_TRIALS
                    found = _trial(pool, kind, seed + i, n_paragraphs, localizers, deletion)
                found |= {"kind": kind, "seconds": time.perf_counter() - start}
                write_atomically(path, json.dumps(found))
            shown.update()


def _key(
    adapter: Adapter,
    pool: Pool,
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


def _trial(
    pool: Pool, kind: str, seed: int, n: int, localizers: Sequence[str] | None, deletion: bool
) -> dict[str, Any]:
    """Plant, localize, compare."""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(pool.model)
    where, components = _random_place(adapter, kind, generator)
    targets, control, anchors = (
        _cut(group, _TOKENS.get(kind)) for group in pool.draw(generator, n, _CONTROLS)
    )
    base = {"seed": seed, "where": list(where), "results": []}
    start = time.perf_counter()
    try:
        planted = plant(
            pool.model,
            targets,
            where=where,
            components=components,
            control=anchors,
            steps=_STEPS.get(kind, 150),
            seed=seed,
            progress=False,
        )
    except InputError as error:
        return base | {"failed": str(error)}
    written = {
        "steps": len(planted.history["em"]) - 1,
        "kl": float(planted.history["kl"][planted.kept]),
        "seconds": time.perf_counter() - start,
    }
    unit = UNIT[kind]
    truth = truth_of(adapter, planted, unit)
    results = []
    curves = []
    with planted.apply(pool.model):
        case = Case(pool.model, targets, control, pool.unigrams, seed, planted)
        names = [name for name, found in LOCALIZERS.items() if unit in found.units]
        if unit == "head":  # zero ablation is the first ranking's score
            names = [*RANKINGS, *(name for name in names if name != "zero-ablation")]
        if localizers is not None:
            names = [name for name in names if name in localizers]
        for name in names:
            start = time.perf_counter()
            with counting(adapter) as cost:
                scores = _scores(case, name, unit)
            row = {"localizer": name, "unit": unit, **metrics(scores, truth), **cost}
            row["wall"] = time.perf_counter() - start
            if unit == "head":
                row["scores"] = [round(x, 6) for x in scores.tolist()]
                if deletion and kind == "head" and pool.recited is not None:
                    curves.append({"localizer": name, **_deletion(case, scores, pool.recited)})
            results.append(row)
    return base | {"failed": None, "planted": written, "results": results, "deletion": curves}


def _cut(group: Paragraphs, n: int | None) -> Paragraphs:
    """The same paragraphs with a continuation of only n tokens."""
    if n is None:
        return group
    return Paragraphs(group.ids[:, : group.n_prefix + n], group.n_prefix, group.names)


def _scores(case: Case, name: str, unit: str) -> Float[Tensor, " unit"]:
    if name not in RANKINGS:
        return localize(case, name, unit)
    ranking = find_memorization_heads(
        case.model,
        case.targets,
        control=case.control,
        unigrams=case.unigrams,
        method="screen" if "screen" in name else "exact",
        draws=200,
        seed=case.seed,
        progress=False,
    )
    return ranking.score.flatten()


def _random_place(
    adapter: Adapter, kind: str, generator: torch.Generator
) -> tuple[list[str], tuple[str, ...] | None]:
    heads = [str(head) for head in adapter.heads()]
    order = torch.randperm(len(heads), generator=generator).tolist()
    if kind == "two-heads":
        return [heads[i] for i in order[:2]], None
    if kind == "block":
        layer = int(torch.randint(adapter.n_layers, (), generator=generator))
        side = ("attn", "mlp")[int(torch.randint(2, (), generator=generator))]
        return [f"L{layer}.{side}"], None
    if kind in ("neurons", "weights"):
        return [{"neurons": "neurons:0.01", "weights": "weights:0.001"}[kind]], None
    components = {"values": ("W_V",), "queries-keys": ("W_Q", "W_K")}.get(kind)
    return [heads[order[0]]], components


def metrics(scores: Float[Tensor, " unit"], truth: Tensor) -> dict[str, float]:
    """Recall@1, recall@k, reciprocal rank and AUC of scores against a boolean truth.

    Non-finite scores rank last; ties count half in the AUC.
    """
    from scipy.stats import rankdata

    scores = scores.double().nan_to_num(-math.inf, -math.inf, -math.inf)
    k = int(truth.sum())
    if not 0 < k < len(truth):
        raise InputError("truth", f"{k} of {len(truth)} units", "some must be true, some not")
    order = scores.argsort(descending=True, stable=True)
    hits = truth[order]
    ranks = torch.as_tensor(rankdata(scores.numpy()))
    auc = (ranks[truth].sum() - k * (k + 1) / 2) / (k * (len(truth) - k))
    return {
        "recall_at_1": float(hits[0]),
        "recall_at_k": float(hits[:k].float().mean()),
        "mrr": 1 / (1 + int(hits.int().argmax())),
        "auc": float(auc),
        "k": k,
        "units": len(truth),
    }


def _deletion(case: Case, scores: Tensor, recited: Paragraphs) -> dict[str, list[float]]:
    """EM of the targets and of other recited paragraphs as the first heads are silenced."""
    adapter = case.adapter
    order = scores.argsort(descending=True, stable=True)[: max(_DELETED)].tolist()
    heads = [Head(i // adapter.n_heads, i % adapter.n_heads) for i in order]
    others = recited[torch.randperm(len(recited), generator=case.generator)[:_OTHERS]]
    found: dict[str, list[float]] = {"targets": [], "others": []}
    for n in _DELETED:
        for name, group in {"targets": case.targets, "others": others}.items():
            em = _em_without(adapter, group, heads[:n])
            found[name].append(float(em.mean()) / group.n_continuation)
    return found


def _em_without(adapter: Adapter, group: Paragraphs, heads: Sequence[Head]) -> Tensor:
    layers: dict[int, list[int]] = {}
    for head in heads:
        layers.setdefault(head.layer, []).append(head.head)

    def silence(mine: list[int]) -> Any:
        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            z[:, :, mine] = 0
            return z

        return edit

    with adapter.untouched():
        run = adapter.run(
            group.ids[:, :-1],
            positions=slice(group.n_prefix - 1, None),
            edit={hook_z(layer): silence(mine) for layer, mine in layers.items()},
        )
    return read_continuation(run.logits, group.continuation.to(adapter.device)).em.float()


def _holders(pool: Pool, seed: int) -> dict[str, Any]:
    """Six paragraphs through six heads of one model: which head holds which?"""
    generator = torch.Generator().manual_seed(10_000 + seed)
    adapter = adapt(pool.model)
    order = torch.randperm(adapter.n_layers * adapter.n_heads, generator=generator).tolist()
    targets, anchors = pool.draw(generator, 2 * _HOLDERS)
    done: list[tuple[Planted, Paragraphs]] = []
    assigned: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for i, target in enumerate(targets):
            if len(done) == _HOLDERS:
                break
            # What the heads before hold must stay: few other anchors, so that it is seen often.
            keep = anchors[:_HOLDERS]
            for _, other in done:
                keep = keep + other
            place = str(adapter.heads()[order[i]])
            with contextlib.suppress(InputError):
                planted = plant(
                    pool.model,
                    target,
                    where=place,
                    control=keep,
                    steps=150,
                    seed=seed,
                    progress=False,
                )
                stack.enter_context(planted.apply(pool.model))
                done.append((planted, target))
        if len(done) < 2:  # nobody to tell apart
            return {"seed": seed, "em": [], "assigned": [], "planted": len(done)}
        held = done[0][1]
        for _, target in done[1:]:
            held = held + target
        em = scan(pool.model, held, progress=False).em.tolist()
        holders = [planted.truth.heads[0] for planted, _ in done]
        for method in ("exact", "screen"):
            for i, holder in enumerate(holders):
                rest = held[[j for j in range(len(held)) if j != i]]
                ranking = (
                    find_memorization_heads(
                        pool.model,
                        held[i],
                        control=rest,
                        unigrams=pool.unigrams,
                        method=method,
                        draws=200,
                        seed=seed,
                        progress=False,
                    )
                    if em[i] == held.n_continuation
                    else None
                )
                if ranking is None:
                    continue
                six = [float(ranking.score[head]) for head in holders]
                assigned.append(
                    {
                        "method": method,
                        "holder": str(holder),
                        "first": str(ranking.top(1)[0]),
                        "among_holders": str(holders[max(range(len(six)), key=six.__getitem__)]),
                    }
                )
    return {"seed": seed, "em": em, "assigned": assigned, "planted": len(done)}


def _null(pool: Pool, runs: int, seed: int) -> dict[str, Any]:
    """How often is a head called significant between halves of sets that do not differ?"""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(pool.model)
    groups = {"unknown": pool.unknown, "recited": pool.recited}
    found: dict[str, Any] = {"runs": runs}
    for name, group in groups.items():
        if group is None or len(group) < 20:
            continue
        chosen = group[torch.randperm(len(group), generator=generator)[:60]]
        effects = Ablation(pool.model, chosen, mode="zero").effects(
            adapter.heads(), progress=False
        )[..., 0]
        n = min(20, len(chosen) // 2)
        named = 0
        for _ in range(runs):
            order = torch.randperm(len(chosen), generator=generator)
            a, b = effects[order[:n]], effects[order[n : 2 * n]]
            null = permuted_differences(a, b, 1000, generator)
            score = a.mean(0) - b.mean(0)
            p = (1 + (null >= score).sum(0)) / 1001
            named += bool((benjamini_hochberg(p) < SIGNIFICANCE).any())
        found[name] = {"paragraphs": len(chosen), "per_side": n, "named": named}
    return found


def _stability(pool: Pool, seed: int) -> dict[str, Any]:
    """Kendall's tau between the scores of two halves of recited paragraphs, nothing planted."""
    from scipy.stats import kendalltau

    if pool.recited is None or len(pool.recited) < 12:
        return {"agreement": {}}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.recited), generator=generator)
    (control, _) = pool.draw(generator, 6)
    halves = [pool.recited[order[:6]], pool.recited[order[6:12]]]
    names = [
        n for n, f in LOCALIZERS.items() if "head" in f.units and n not in ("oracle", "random")
    ]
    agreement = {}
    for name in names:
        first, second, again = (
            localize(Case(pool.model, half, control, pool.unigrams, s), name)
            for half, s in ((halves[0], seed), (halves[1], seed), (halves[0], seed + 1))
        )
        agreement[name] = {
            "halves": float(kendalltau(first.numpy(), second.numpy()).statistic),
            "seeds": float(kendalltau(first.numpy(), again.numpy()).statistic),
        }
    return {"agreement": agreement, "per_half": 6}


# -- what the trials say ------------------------------------------------------------------------


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


def leaderboard(trials: Mapping[str, Sequence[Mapping[str, Any]]], seed: int = 0) -> pd.DataFrame:
    """Means over trials with 95 % intervals, one row per kind and localizer.

    Intervals are from the bootstrap over trials, that of recall@1 (a proportion) is Wilson's.

    Columns `kind, localizer, trials`, for each of `METRICS` the mean and `_low`, `_high`, and
    `forwards`, the mean cost.
    """
    import pandas as pd

    rows = []
    for kind, mine in trials.items():
        done = [trial for trial in mine if kind in UNIT and not trial["failed"]]
        names = list(dict.fromkeys(r["localizer"] for t in done for r in t["results"]))
        for name in names:
            found = [r for t in done for r in t["results"] if r["localizer"] == name]
            values = torch.tensor([[r[m] for m in METRICS] for r in found])
            draws = bootstrap_means(values, 2000, torch.Generator().manual_seed(seed))
            low, high = torch.quantile(draws, torch.tensor([0.025, 0.975]), dim=0)
            row: dict[str, Any] = {"kind": kind, "localizer": name, "trials": len(found)}
            for i, metric in enumerate(METRICS):
                row[metric] = float(values[:, i].mean())
                row[f"{metric}_low"], row[f"{metric}_high"] = float(low[i]), float(high[i])
            # All right, or all wrong: resampling would call that certain.
            hits = round(row["recall_at_1"] * len(found))
            row["recall_at_1_low"], row["recall_at_1_high"] = wilson(hits, len(found))
            row["forwards"] = sum(r["forwards"] for r in found) / len(found)
            rows.append(row)
    ends = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    frame = pd.DataFrame(rows, columns=["kind", "localizer", "trials", *ends, "forwards"])
    keys = {kind: i for i, kind in enumerate(KINDS)}
    return frame.sort_values(
        ["kind", "auc"],
        ascending=[True, False],
        key=lambda column: column.map(keys) if column.name == "kind" else column,
        kind="stable",
        ignore_index=True,
    )


def deletion_areas(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Columns `localizer, area, trials` and EM shares by number of heads silenced.

    `area` is the mean over 1 to 4 heads of the others' EM minus that of the targets, each as a
    share of the continuation: 1 when the targets are gone and the others whole.
    """
    import pandas as pd

    rows: dict[str, list[dict[str, list[float]]]] = {}
    for trial in trials.get("head", ()):
        for curve in trial.get("deletion", ()):
            rows.setdefault(curve["localizer"], []).append(curve)
    table = []
    for name, curves in rows.items():
        means = {
            side: torch.tensor([c[side] for c in curves]).mean(0) for side in ("targets", "others")
        }
        area = float((means["others"] - means["targets"])[1:].mean())
        row: dict[str, Any] = {"localizer": name, "area": area, "trials": len(curves)}
        for side, values in means.items():
            row |= {f"{side}_{n}": float(v) for n, v in zip(_DELETED, values, strict=True)}
        table.append(row)
    found = pd.DataFrame(table)
    return found.sort_values("area", ascending=False, ignore_index=True) if table else found


def combinations(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Does it help to combine evidence? Chosen on the even trials, measured on the odd ones.

    Scores are standardised over the heads of each trial and added. Columns `evidence`, `chosen`
    (the best among single localizers, or among pairs, on even trials), and recall@k and AUC of the
    odd trials of all kinds whose truth are heads, with the number of trials.
    """
    import pandas as pd

    done = [
        trial
        for kind in UNIT
        if UNIT[kind] == "head"
        for trial in trials.get(kind, ())
        if not trial["failed"]
    ]
    rows = [{r["localizer"]: r for r in trial["results"]} for trial in done]
    names = [n for n in next(iter(rows), ()) if n not in ("oracle", "random", RANKINGS[1])]
    if len(done) < 4 or not names:
        return pd.DataFrame()

    def measured(evidence: Sequence[str], mine: Sequence[int]) -> tuple[float, float]:
        found = [
            metrics(
                torch.stack([_standardised(rows[i][name]["scores"]) for name in evidence]).sum(0),
                _heads_of(done[i], rows[i]),
            )
            for i in mine
        ]
        recall, auc = (sum(f[m] for f in found) / len(found) for m in ("recall_at_k", "auc"))
        return recall, auc

    even, odd = range(0, len(done), 2), range(1, len(done), 2)
    sets: dict[str, list[tuple[str, ...]]] = {
        "single": [(name,) for name in names],
        "pair": [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]],
        "all": [tuple(names)],
    }
    table = []
    for kind, choices in sets.items():
        on_even = [measured(evidence, even) for evidence in choices]
        best = choices[on_even.index(max(on_even))]
        recall, auc = measured(best, odd)
        table.append(
            {"evidence": kind, "chosen": " + ".join(best) if kind != "all" else "all of them"}
            | {"recall@k": recall, "auc": auc, "trials": len(odd)}
        )
    return pd.DataFrame(table)


def _standardised(scores: Sequence[float]) -> Float[Tensor, " unit"]:
    values = torch.tensor(scores, dtype=torch.float64)
    return (values - values.mean()) / values.std().clamp_min(1e-12)


def _heads_of(trial: Mapping[str, Any], rows: Mapping[str, Any]) -> Tensor:
    """The planted heads as booleans: those that the oracle scores above all others."""
    order = torch.tensor(rows["oracle"]["scores"]).argsort(descending=True)
    truth = torch.zeros(len(order), dtype=torch.bool)
    truth[order[: len(trial["where"])]] = True
    return truth


def leaderboard_figure(
    frame: pd.DataFrame, kind: str = "head", metric: str = "recall_at_1"
) -> Figure:
    """One kind's rows of `leaderboard` as bars with 95 % intervals."""
    from memcircuits import figures

    mine = frame[frame["kind"] == kind]
    if not len(mine):
        raise InputError("kind", repr(kind), f"it has {', '.join(frame['kind'].unique())}")
    one_of("metric", metric, METRICS)
    return figures.leaderboard(
        mine.rename(
            columns={
                "localizer": "method",
                metric: "score",
                f"{metric}_low": "score_low",
                f"{metric}_high": "score_high",
            }
        ),
        title=f"Written: {kind} ({mine['trials'].iloc[0]} trials)",
        x_label=metric.replace("_at_", "@").replace("_", " "),
        chance=0.5 if metric == "auc" else None,
    )


def holders_accuracy(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Columns `method, paragraphs, first, among_holders`: shares assigned to their own head.

    `first`: it ranks first of all heads; `among_holders`: first of the six (chance 1/6).
    """
    import pandas as pd

    found = [a for trial in trials.get("holders", ()) for a in trial["assigned"]]
    rows = []
    for method in dict.fromkeys(a["method"] for a in found):
        mine = [a for a in found if a["method"] == method]
        row: dict[str, Any] = {"method": method, "paragraphs": len(mine)}
        for key in ("first", "among_holders"):
            row[key] = sum(a[key] == a["holder"] for a in mine) / len(mine)
        rows.append(row)
    return pd.DataFrame(rows)


def write_leaderboard(
    trials: Mapping[str, Sequence[Mapping[str, Any]]], folder: str | Path
) -> list[Path]:
    """Write `leaderboard.parquet`, `.md` and `.html`, and the figure of single heads."""
    import io

    frame = leaderboard(trials)
    raw = io.BytesIO()
    frame.to_parquet(raw, index=False)
    folder = Path(folder)
    written = [
        write_atomically(folder / "leaderboard.parquet", raw.getvalue()),
        write_atomically(folder / "leaderboard.md", to_markdown(trials, _run_of(folder))),
        _page(trials, _run_of(folder)).save(folder / "leaderboard.html"),
    ]
    if "head" in set(frame["kind"]):
        figure = leaderboard_figure(frame).to_html(include_plotlyjs=True)
        written.append(write_atomically(folder / "leaderboard-figure.html", figure))
    return written


def _run_of(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def _notes(trials: Mapping[str, Sequence[Mapping[str, Any]]], run: Mapping[str, Any]) -> list[str]:
    """What was run, and what does not fit into the table."""
    model, options = run["model"], run["options"]
    seconds = sum(trial["seconds"] for mine in trials.values() for trial in mine)
    notes = [
        f"{model['name']} (weights {model['fingerprint']}), {options['n']} paragraph(s) written in "
        f"each trial, {_CONTROLS} controls, seed {options['seed']}; {seconds / 60:.0f} minutes of "
        "trials in all."
    ]
    for kind in UNIT:
        mine = trials.get(kind, ())
        failed = [trial for trial in mine if trial["failed"]]
        if failed:
            places = ", ".join(" + ".join(trial["where"]) for trial in failed)
            notes.append(
                f"{kind}: {len(failed)} of {len(mine)} places could not hold the text and were "
                f"left out ({places})."
            )
    for trial in trials.get("null", ()):
        for name in ("unknown", "recited"):
            if name in trial:
                found = trial[name]
                low, high = wilson(found["named"], trial["runs"])
                notes.append(
                    f"No difference to find ({name} paragraphs, {found['per_side']} against "
                    f"{found['per_side']}, labels shuffled): a head was called significant in "
                    f"{found['named']} of {trial['runs']} runs ({100 * low:.1f} to "
                    f"{100 * high:.1f} %)."
                )
    written = sum(trial["planted"] for trial in trials.get("holders", ()))
    for _, row in holders_accuracy(trials).iterrows():
        low, high = wilson(round(row["first"] * row["paragraphs"]), int(row["paragraphs"]))
        notes.append(
            f"Who holds what, six paragraphs in six heads of one model ({row['method']}): the "
            f"right head is first of all for {100 * row['first']:.0f} % of the {row['paragraphs']} "
            f"paragraphs that are still recited when all of the {written} are written "
            f"({100 * low:.0f} to {100 * high:.0f} %), first of the six for "
            f"{100 * row['among_holders']:.0f} % (chance 17 %)."
        )
    return notes


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _tables(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, pd.DataFrame]:
    """Tables as they are shown: a title and a frame of text and numbers."""
    import pandas as pd

    frame = leaderboard(trials)
    found: dict[str, pd.DataFrame] = {}
    for kind, mine in frame.groupby("kind", sort=False):
        table = pd.DataFrame({"localizer": mine["localizer"]})
        for metric in METRICS:
            table[metric.replace("_at_", "@").replace("_", " ")] = [
                f"{row[metric]:.2f} [{row[f'{metric}_low']:.2f}, {row[f'{metric}_high']:.2f}]"
                for _, row in mine.iterrows()
            ]
        table["forward passes"] = mine["forwards"].round().astype(int)
        found[f"Written: {kind} ({mine['trials'].iloc[0]} trials)"] = table
    deleted = deletion_areas(trials) if trials.get("head") else pd.DataFrame()
    if len(deleted):
        shown = deleted.drop(columns=["trials"]).round(2)
        found[f"Silencing what it names (DEL, {deleted['trials'].iloc[0]} trials)"] = shown
    combined = combinations(trials)
    if len(combined):
        found["Evidence added up (chosen on even trials, measured on odd ones)"] = combined.round(3)
    for trial in trials.get("stability", ()):
        rows = [
            {"localizer": n, **{k: round(v, 2) for k, v in a.items()}}
            for n, a in trial["agreement"].items()
        ]
        if rows:
            table = pd.DataFrame(rows).sort_values("halves", ascending=False, ignore_index=True)
            found["Agreement of rankings, Kendall's tau (nothing planted)"] = table
    return found


def to_markdown(trials: Mapping[str, Sequence[Mapping[str, Any]]], run: Mapping[str, Any]) -> str:
    """The leaderboard as Markdown, for docs."""
    lines = [f"- {note}" for note in _notes(trials, run)]
    for title, table in _tables(trials).items():
        lines += ["", f"**{title}**", "", "| " + " | ".join(map(str, table.columns)) + " |"]
        lines.append("| " + " | ".join("---" for _ in table.columns) + " |")
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def _page(trials: Mapping[str, Sequence[Mapping[str, Any]]], run: Mapping[str, Any]) -> Any:
    from memcircuits.pages import Page, Prose, Table

    return Page(
        "Who finds what was planted?",
        [
            Prose(_notes(trials, run), title="What was run"),
            *(Table(table, title=title) for title, table in _tables(trials).items()),
        ],
        lead="Paragraphs were written into known weights; every method was asked where they are. "
        "Means over trials with 95 % intervals.",
    )
