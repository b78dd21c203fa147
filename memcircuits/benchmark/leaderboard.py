"""Aggregates over trials: the leaderboard, and the tables beside it.

A row of the leaderboard is one localizer in one kind of trial. Trials that plant in the same place
are no independent evidence: some places are easier to find than others. Places are drawn with
replacement, so trials are averaged within their place, and places are what is averaged and
resampled: the percentile bootstrap, and Wilson's interval for recall@1, which is a proportion. One
place has no interval. `deletions` and `combinations` add two checks that need no truth of their
own: whether ablating the head that a localizer names removes the targets and nothing else, and
whether sums of localizers' scores find the planted heads better than the best single localizer. The
latter is chosen on one half of the trials and measured on the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import bootstrap_interval, count_groups, group_means
from memcircuits.benchmark.metrics import METRICS, Metric, metrics, wilson
from memcircuits.benchmark.schemas import DeletionScore, LocalizerScore, PlantedTrial, Trials
from memcircuits.benchmark.trial_kinds import (
    PLANTED_KINDS,
    RANKINGS,
    TEXT_BLIND,
    UNIT_OF_KIND,
    PlantedKind,
)

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def leaderboard(trials: Trials, seed: int = 0) -> pd.DataFrame:
    """Means over places with 95 % intervals, one row per kind and localizer.

    Args:
        trials: see `read_trials`.
        seed: seed of the bootstrap.

    Returns:
        Columns `kind, localizer, trials, places`, for each of `METRICS` the mean and `_low`,
        `_high` (NaN for a single place), and `forwards`, the mean cost in forward passes of one
        paragraph. By kind in the order of `PLANTED_KINDS`, then by AUC.
    """
    import pandas as pd

    rows = []
    for kind in PLANTED_KINDS:
        by_localizer: dict[str, list[tuple[int, LocalizerScore]]] = {}
        planted = _planted(trials, kind)
        for place, trial in zip(_places(planted, kind), planted, strict=True):
            for result in trial.results:
                by_localizer.setdefault(result.localizer, []).append((place, result))
        kind_rows: list[dict[str, Any]] = []
        for name, results in by_localizer.items():
            places = torch.tensor([place for place, _ in results])
            means = _means([result for _, result in results], places, seed)
            n = {"trials": len(results), "places": count_groups(places)}
            kind_rows.append({"kind": kind, "localizer": name, **n, **means})
        rows += sorted(kind_rows, key=lambda row: row["auc"], reverse=True)
    columns = [f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_low", "_high")]
    names = ["kind", "localizer", "trials", "places", *columns, "forwards"]
    return pd.DataFrame(rows, columns=names)


def given_away(frame: pd.DataFrame) -> dict[str, str]:
    """The kinds of trial whose places a text-blind localizer finds, and which one it is.

    Such trials say nothing about reading memory. The bound is a recall@1 of 0.1 below which the
    interval does not reach: chance is 0.08 for a layer's attention or MLP, less for the others.

    Args:
        frame: the leaderboard.
    """
    blind = frame[frame["localizer"].isin(TEXT_BLIND) & (frame["recall_at_1_low"] > 0.1)]
    best = blind.sort_values("recall_at_1").groupby("kind")["localizer"].last()
    return {str(kind): str(name) for kind, name in best.items()}


def _planted(trials: Trials, kind: PlantedKind) -> list[PlantedTrial]:
    """The trials of a kind in which planting succeeded."""
    return [trial for trial in trials.get(kind, []) if not trial.failed]


def _places(trials: Sequence[PlantedTrial], kind: PlantedKind) -> list[int]:
    """Number of each trial's place; neurons and weights are chosen anew in every trial."""
    if UNIT_OF_KIND[kind] in ("neuron", "weight"):
        return list(range(len(trials)))
    numbers: dict[frozenset[str], int] = {}
    return [numbers.setdefault(frozenset(trial.where), len(numbers)) for trial in trials]


def _means(
    results: Sequence[LocalizerScore], places: Int[Tensor, " trial"], seed: int
) -> dict[str, float]:
    """Mean and interval of each metric over places, and the mean cost of a trial."""
    values = torch.tensor([[getattr(r, metric) for metric in METRICS] for r in results])
    low, high = bootstrap_interval(values, places, seed=seed)
    of_places = group_means(values, places)
    means: dict[str, float] = {}
    for i, metric in enumerate(METRICS):
        means[metric] = float(of_places[:, i].mean())
        means[f"{metric}_low"], means[f"{metric}_high"] = float(low[i]), float(high[i])
    # If all places are right, or all wrong, every bootstrap resample is the same.
    bounds = wilson(means["recall_at_1"], len(of_places))
    means["recall_at_1_low"], means["recall_at_1_high"] = bounds
    means["forwards"] = sum(result.forwards for result in results) / len(results)
    return means


def deletions(trials: Trials, seed: int = 0) -> pd.DataFrame:
    """What is still recited without the head that a localizer ranks first.

    One head was planted, so one is ablated: all that a localizer ranks after it has no truth.

    Args:
        trials: see `read_trials`.
        seed: seed of the bootstrap.

    Returns:
        Columns `localizer, trials, targets, others` (EM of the planted paragraphs and of others as
        a fraction of the continuation) and `difference`, others minus targets, with `_low`,
        `_high`: 1 if the targets are forgotten and the others still recited in full. Means over
        places.
    """
    import pandas as pd

    planted = _planted(trials, "head")
    by_localizer: dict[str, list[tuple[int, DeletionScore]]] = {}
    for place, trial in zip(_places(planted, "head"), planted, strict=True):
        for score in trial.deletions:
            by_localizer.setdefault(score.localizer, []).append((place, score))
    rows: list[dict[str, Any]] = []
    for name, scores in by_localizer.items():
        places = torch.tensor([place for place, _ in scores])
        em = torch.tensor([[s.targets, s.others, s.others - s.targets] for _, s in scores])
        targets, others, difference = group_means(em, places).mean(0).tolist()
        low, high = bootstrap_interval(em[:, 2], places, seed=seed).tolist()
        row = {"localizer": name, "trials": len(scores), "targets": targets, "others": others}
        row |= {"difference": difference, "difference_low": low, "difference_high": high}
        rows.append(row)
    frame = pd.DataFrame(rows)
    if rows:
        frame = frame.sort_values("difference", ascending=False, ignore_index=True)
    return frame


def combinations(trials: Trials) -> pd.DataFrame:
    """Whether combined evidence finds planted heads better: chosen on even, measured on odd trials.

    Scores are standardized over the heads of each trial and added.

    Returns:
        Columns `evidence` (`single`, `pair` or `all`), `chosen` (the best of these on the even
        trials), `recall@k` and `auc` on the odd trials, and their number `trials`. Trials of all
        kinds that plant in heads count. Empty with fewer than four trials, or without `oracle`.
    """
    import pandas as pd

    done = [
        trial
        for kind in PLANTED_KINDS
        if UNIT_OF_KIND[kind] == "head"
        for trial in _planted(trials, kind)
    ]
    scores = [{result.localizer: _scores(result) for result in t.results} for t in done]
    if len(done) < 4 or not all("oracle" in by_name for by_name in scores):
        return pd.DataFrame()
    names = [name for name in scores[0] if name not in ("oracle", "random", RANKINGS[1])]
    if not names:
        return pd.DataFrame()
    # Trials with their truth: those to choose on, and those to measure on.
    cases = [
        (by_name, _highest(by_name["oracle"], len(trial.where)))
        for trial, by_name in zip(done, scores, strict=True)
    ]
    even, odd = cases[::2], cases[1::2]
    candidates: dict[str, list[tuple[str, ...]]] = {
        "single": [(name,) for name in names],
        "pair": list(itertools.combinations(names, 2)),
        "all": [tuple(names)],
    }
    rows = []
    for evidence, choices in candidates.items():
        if choices:  # a single localizer makes no pair
            best = max(choices, key=lambda choice: _mean_metrics(choice, even))
            recall, auc = _mean_metrics(best, odd)
            row = {"evidence": evidence, "chosen": " + ".join(best)}
            if evidence == "all":
                row["chosen"] = "all of them"
            rows.append(row | {"recall@k": recall, "auc": auc, "trials": len(odd)})
    return pd.DataFrame(rows)


def _mean_metrics(
    evidence: Sequence[str], cases: Sequence[tuple[dict[str, Tensor], Tensor]]
) -> tuple[float, float]:
    """Mean recall@k and AUC over trials of the sum of some localizers' standardized scores."""
    results = []
    for scores, truth in cases:
        standardized = [_standardized(scores[name]) for name in evidence]
        results.append(metrics(torch.stack(standardized).sum(0), truth))
    recall = sum(result["recall_at_k"] for result in results) / len(results)
    auc = sum(result["auc"] for result in results) / len(results)
    return recall, auc


def _scores(result: LocalizerScore) -> Float[Tensor, " head"]:
    return torch.tensor(result.scores, dtype=torch.float64)


def _standardized(scores: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    return (scores - scores.mean()) / scores.std().clamp_min(1e-12)


def _highest(scores: Float[Tensor, " head"], k: int) -> Bool[Tensor, " head"]:
    """The heads with the `k` highest scores: of the oracle, the planted heads."""
    is_highest = torch.zeros(len(scores), dtype=torch.bool)
    is_highest[scores.argsort(descending=True)[:k]] = True
    return is_highest


def decoys_named(trials: Trials) -> pd.DataFrame:
    """How often a decoy ranks first: the damaged head, or the one that holds the controls.

    Returns:
        Columns `localizer, trials, damaged, holder`: fractions of the trials, with `_low`, `_high`.
    """
    import pandas as pd

    named: dict[str, list[list[bool]]] = {}
    for trial in _planted(trials, "decoys"):
        for result in trial.results:
            is_first = [result.first == decoy for decoy in trial.decoys]
            named.setdefault(result.localizer, []).append(is_first)
    rows: list[dict[str, Any]] = []
    for name, of_trials in named.items():
        row: dict[str, Any] = {"localizer": name, "trials": len(of_trials)}
        for column, hits in zip(("damaged", "holder"), zip(*of_trials, strict=True), strict=True):
            row[column] = sum(hits) / len(hits)
            row[f"{column}_low"], row[f"{column}_high"] = wilson(row[column], len(hits))
        rows.append(row)
    return pd.DataFrame(rows)


def holders_accuracy(trials: Trials) -> pd.DataFrame:
    """How often a paragraph is attributed to the head that it was planted through.

    Returns:
        Columns `method, paragraphs, trials, first, among_holders, decoy`, the last three with
        `_low`, `_high`. `first`: fraction of the paragraphs whose own head ranks first of all
        heads; `among_holders`: first of the six planted heads (1/6 by chance); `decoy`: fraction
        with the head of another paragraph first of all. Paragraphs of one trial share a model, so
        trials are what is averaged.
    """
    import pandas as pd

    assigned = [(i, a) for i, trial in enumerate(trials.get("holders", [])) for a in trial.assigned]
    holders = {(i, a.holder) for i, a in assigned}
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(a.method for _, a in assigned):
        of_method = [(i, a) for i, a in assigned if a.method == method]
        groups = torch.tensor([i for i, _ in of_method])
        n = count_groups(groups)
        row: dict[str, Any] = {"method": method, "paragraphs": len(of_method), "trials": n}
        hits = {
            "first": [a.first == a.holder for _, a in of_method],
            "among_holders": [a.among_holders == a.holder for _, a in of_method],
            "decoy": [a.first != a.holder and (i, a.first) in holders for i, a in of_method],
        }
        for name, values in hits.items():
            row[name] = float(group_means(torch.tensor(values).float(), groups).mean())
            row[f"{name}_low"], row[f"{name}_high"] = wilson(row[name], n)
        rows.append(row)
    return pd.DataFrame(rows)


def leaderboard_figure(
    frame: pd.DataFrame, kind: PlantedKind = "head", metric: Metric = "recall_at_1"
) -> Figure:
    """One kind's rows of `leaderboard` as bars with 95 % intervals.

    Args:
        frame: the leaderboard.
        kind: the kind of trial.
        metric: the length of the bars.

    Raises:
        InputError: if the leaderboard has no such kind, or there is no such metric.
    """
    from memcircuits.display import figures

    of_kind = frame[frame["kind"] == kind]
    if of_kind.empty:
        raise InputError("kind", repr(kind), f"it has {', '.join(frame['kind'].unique())}")
    one_of("metric", metric, METRICS)
    columns = {
        "localizer": "method",
        metric: "score",
        f"{metric}_low": "score_low",
        f"{metric}_high": "score_high",
    }
    return figures.leaderboard(
        of_kind.rename(columns=columns),
        title=f"Written: {kind} ({of_kind['trials'].iloc[0]} trials)",
        x_label=metric.replace("_at_", "@").replace("_", " "),
        chance=0.5 if metric == "auc" else None,
    )
