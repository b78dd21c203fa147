"""Aggregates over trials: the leaderboard, and the tables beside it.

A row of the leaderboard is one localizer in one kind of trial. Intervals are over trials: the
percentile bootstrap, and Wilson's interval for recall@1, which is a proportion. `deletion_areas`
and `combinations` add two checks that need no truth of their own: whether ablating the heads that a
localizer names removes the targets and nothing else, and whether sums of localizers' scores find
the planted heads better than the best single localizer. The latter is chosen on one half of the
trials and measured on the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import bootstrap_interval
from memcircuits.benchmark.metrics import METRICS, Metric, metrics, wilson
from memcircuits.benchmark.schemas import DeletionCurve, LocalizerScore, PlantedTrial, Trials
from memcircuits.benchmark.trial_kinds import (
    DELETED,
    PLANTED_KINDS,
    RANKINGS,
    UNIT_OF_KIND,
    PlantedKind,
)

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def leaderboard(trials: Trials, seed: int = 0) -> pd.DataFrame:
    """Means over trials with 95 % intervals, one row per kind and localizer.

    Args:
        trials: see `read_trials`.
        seed: seed of the bootstrap.

    Returns:
        Columns `kind, localizer, trials`, for each of `METRICS` the mean and `_low`, `_high`, and
        `forwards`, the mean cost in forward passes of one paragraph. By kind in the order of
        `PLANTED_KINDS`, then by AUC.
    """
    import pandas as pd

    rows = []
    for kind in PLANTED_KINDS:
        by_localizer: dict[str, list[LocalizerScore]] = {}
        for trial in _planted(trials, kind):
            for result in trial.results:
                by_localizer.setdefault(result.localizer, []).append(result)
        kind_rows: list[dict[str, Any]] = [
            {"kind": kind, "localizer": name, "trials": len(results), **_means(results, seed)}
            for name, results in by_localizer.items()
        ]
        rows += sorted(kind_rows, key=lambda row: row["auc"], reverse=True)
    means = [f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["kind", "localizer", "trials", *means, "forwards"])


def _planted(trials: Trials, kind: PlantedKind) -> list[PlantedTrial]:
    """The trials of a kind in which planting succeeded."""
    return [trial for trial in trials.get(kind, []) if not trial.failed]


def _means(results: Sequence[LocalizerScore], seed: int) -> dict[str, float]:
    """Mean and interval of each metric over trials, and the mean cost."""
    values = torch.tensor([[getattr(r, metric) for metric in METRICS] for r in results])
    low, high = bootstrap_interval(values, seed=seed)
    means: dict[str, float] = {}
    for i, metric in enumerate(METRICS):
        means[metric] = float(values[:, i].mean())
        means[f"{metric}_low"], means[f"{metric}_high"] = float(low[i]), float(high[i])
    # If all trials are right, or all wrong, every bootstrap resample is the same.
    hits = round(means["recall_at_1"] * len(results))
    means["recall_at_1_low"], means["recall_at_1_high"] = wilson(hits, len(results))
    means["forwards"] = sum(result.forwards for result in results) / len(results)
    return means


def deletion_areas(trials: Trials) -> pd.DataFrame:
    """EM of the targets and of other paragraphs by number of heads ablated.

    Returns:
        Columns `localizer, area, trials`, and `targets_n` and `others_n`: EM as a fraction of the
        continuation with n heads ablated. `area` is the mean over 1 to 4 heads of the others' EM
        minus the targets': 1 if the targets are forgotten and the others still recited in full.
    """
    import pandas as pd

    by_localizer: dict[str, list[DeletionCurve]] = {}
    for trial in trials.get("head", []):
        for curve in trial.deletion:
            by_localizer.setdefault(curve.localizer, []).append(curve)
    if not by_localizer:
        return pd.DataFrame()
    rows = []
    for name, curves in by_localizer.items():
        targets = torch.tensor([curve.targets for curve in curves]).mean(0)
        others = torch.tensor([curve.others for curve in curves]).mean(0)
        area = float((others - targets)[1:].mean())
        row: dict[str, Any] = {"localizer": name, "area": area, "trials": len(curves)}
        for side, means in (("targets", targets), ("others", others)):
            row |= {f"{side}_{n}": float(em) for n, em in zip(DELETED, means, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("area", ascending=False, ignore_index=True)


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


def holders_accuracy(trials: Trials) -> pd.DataFrame:
    """How often a paragraph is attributed to the head that it was planted through.

    Returns:
        Columns `method, paragraphs, first, among_holders`. `first`: fraction of the paragraphs
        whose own head ranks first of all heads; `among_holders`: first of the six planted heads
        (1/6 by chance).
    """
    import pandas as pd

    assigned = [a for trial in trials.get("holders", []) for a in trial.assigned]
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(a.method for a in assigned):
        of_method = [a for a in assigned if a.method == method]
        n = len(of_method)
        rows.append(
            {
                "method": method,
                "paragraphs": n,
                "first": sum(a.first == a.holder for a in of_method) / n,
                "among_holders": sum(a.among_holders == a.holder for a in of_method) / n,
            }
        )
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
