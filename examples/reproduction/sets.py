"""Experiments on what is recited: sets, duplication, perturbation."""

from __future__ import annotations

from typing import Any

import torch

import memcircuits as mc
from reproduction.charts import lines
from reproduction.statistics import mean, rank_correlation, resampled
from reproduction.study import CannotRun, Outcome, Study, experiment, row


@experiment("Sets of paragraphs", "section 3")
def sets(study: Study) -> Outcome:
    paper = {"50": "442", "30-49": "141", "11-29": "436", "0-10": "12,422"}
    note = "counts of the files given" + (", taken as given" if study.as_given else "")
    n = len(study.everything)
    rows = []
    for bucket, printed in paper.items():
        count = len(study.buckets.get(bucket, ()))
        rows.append(row(f"paragraphs with EM {bucket}", printed, count, n, "paragraphs", note))
    told = f"at least {100 * study.filters.min_unique:g} % of the tokens differ"
    if study.filters.keywords:
        told += f"; no keyword of {', '.join(study.filters.keywords)}"
    if study.filters.per_count is not None:
        told += f"; {study.filters.per_count} of each number of occurrences"
    rows.append(row("paragraphs that the filters dropped", "", study.n_dropped, n, note=told))
    return Outcome(rows)


@experiment("Duplication", "figure 2")
def duplication(study: Study) -> Outcome:
    try:
        table = study.scan.by_repetitions()
    except mc.InputError as error:
        raise CannotRun(f"{error} (the authors' mem_strings.csv has a column count)") from None
    frame = study.scan.to_frame()
    times = frame[next(key for key in ("repetitions", "count", "duplicates") if key in frame)]
    rows = []
    for measure in ("em", "nll"):
        known = torch.tensor([times.to_list(), frame[measure].to_list()], dtype=torch.float64).T
        what = f"rank correlation of {measure.upper()} with the times seen in training"
        rows.append(row(what, "", resampled(known, rank_correlation), len(known)))
    points = table[table["repetitions"] > 0].to_dict("records")
    labels = {"x_label": "times seen in training", "log_x": True}
    charts = [
        lines(f"{y.upper()} against the times seen in training", points, "repetitions", y,
              y_label=y.upper(), units=units, **labels)
        for y, units in {"em": "tokens", "nll": "nats/token"}.items()
    ]  # fmt: skip
    return Outcome(rows, charts)


@experiment("Prefix perturbation", "figure 3")
def perturbation(study: Study) -> Outcome:
    other = mc.perturb_prefix(study.model, study.own, seed=study.seed, **study.options)
    notes = ("", "against the model's own greedy continuations, as in the paper")
    outcome, points = [], []
    sets = {"memorized": (study.perturbed, "12.19"), "not memorized": (other, "33.12")}
    for (name, (result, printed)), note in zip(sets.items(), notes, strict=True):
        # The paper's code leaves position 0 as it is: its means are over the other positions.
        value = mean(result.em_drop[:, 1:].mean(1))
        what = f"EM lost by replacing one prefix token, {name}"
        outcome.append(row(what, printed, value, len(result.em), "tokens", note))
        points += result.curves().assign(set=name).to_dict("records")
    labels: dict[str, Any] = {"by": "set", "y_label": "EM", "units": "tokens"}
    if "em_low" in points[0]:
        labels |= {"low": "em_low", "high": "em_high"}
    points = [point for point in points if point["position"] > 0]
    labels["note"] = "Position 0 is left out, as in the paper: it is its unperturbed baseline."
    title = "EM left when the token at a position is replaced"
    return Outcome(outcome, [lines(title, points, "position", "em", **labels)])
