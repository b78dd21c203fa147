"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.benchmark.kinds import DELETED, KINDS, METRICS, RANKINGS, UNIT
from memcircuits.benchmark.metrics import metrics, wilson
from memcircuits.core.errors import InputError, one_of
from memcircuits.core.statistics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


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
            low, high = bootstrap_interval(values, seed=seed)
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
            row |= {f"{side}_{n}": float(v) for n, v in zip(DELETED, values, strict=True)}
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
                truth_heads(done[i], rows[i]),
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


def truth_heads(trial: Mapping[str, Any], rows: Mapping[str, Any]) -> Tensor:
    """The planted heads as booleans: those that the oracle scores above all others."""
    order = torch.tensor(rows["oracle"]["scores"]).argsort(descending=True)
    truth = torch.zeros(len(order), dtype=torch.bool)
    truth[order[: len(trial["where"])]] = True
    return truth


def leaderboard_figure(
    frame: pd.DataFrame, kind: str = "head", metric: str = "recall_at_1"
) -> Figure:
    """One kind's rows of `leaderboard` as bars with 95 % intervals."""
    from memcircuits.display import figures

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
