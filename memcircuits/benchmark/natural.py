"""The natural leaderboard: which localizer may be believed about trained memory, and how far?

Per direction and localizer, over the trials of `memcircuits.benchmark.natural_trials`: scores and
truth are averaged over the trials, and compared by Spearman's rank correlation over all heads and
by recall@k, the share of the k heads with the largest truth among the k with the largest score. The
bootstrap resamples trials, each of other paragraphs, and averages scores and truth anew, so that
intervals hold for other paragraphs of the same models.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import at_least
from memcircuits.base.io import write_atomically
from memcircuits.base.statistics import DRAWS, bootstrap_means, interval
from memcircuits.benchmark.natural_trials import DIRECTIONS, REFERENCES, NaturalTrial
from memcircuits.evidence.transplants.results import MEASURES, Measure

if TYPE_CHECKING:
    import pandas as pd

K = 5
"""Number of heads that recall counts by default."""


def natural_leaderboard(
    trials: Sequence[NaturalTrial], *, k: int = K, seed: int = 0
) -> pd.DataFrame:
    """Agreement of every localizer with transplants, one row per direction, truth and localizer.

    Args:
        trials: see `read_natural_trials`.
        k: number of heads that recall counts.
        seed: seed of the bootstrap.

    Returns:
        Columns `direction, truth, localizer, reference` (whether it is one), `trials`, and
        `correlation` and `recall` with 95 % intervals over trials (`_low`, `_high`; NaN for a
        single trial), `forwards`, the mean cost in forward passes of one paragraph. By direction
        and truth, then by correlation.
    """
    import pandas as pd

    at_least("k", k, 1)
    rows = []
    for direction in DIRECTIONS:
        of_direction = [trial for trial in trials if trial.direction == direction]
        for measure in MEASURES:
            names = ["other truth", *dict.fromkeys(name for t in of_direction for name in t.scores)]
            block = [
                _row(of_direction, measure, name, k, seed) | {"direction": direction}
                for name in names
                if of_direction
            ]
            rows += sorted(block, key=lambda row: _last_if_nan(row["correlation"]), reverse=True)
    columns = ["direction", "truth", "localizer", "reference", "trials"]
    metrics = [
        f"{name}{end}" for name in ("correlation", "recall") for end in ("", "_low", "_high")
    ]
    return pd.DataFrame(rows, columns=[*columns, *metrics, "forwards"])


def _last_if_nan(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _row(
    trials: Sequence[NaturalTrial], measure: Measure, name: str, k: int, seed: int
) -> dict[str, Any]:
    other: Measure = "sufficiency" if measure == "necessity" else "necessity"
    scored = [t for t in trials if name == "other truth" or name in t.scores]
    scores = [getattr(t, other) if name == "other truth" else t.scores[name] for t in scored]
    truth = [getattr(t, measure) for t in scored]
    both = torch.stack([torch.tensor(scores), torch.tensor(truth)], 1)  # [trial, 2, head]
    row: dict[str, Any] = {"truth": measure, "localizer": name, "reference": name in REFERENCES}
    row["trials"] = len(scored)
    resampled = bootstrap_means(both, DRAWS, torch.Generator().manual_seed(seed))
    mean, draws = both.mean(0, keepdim=True), resampled
    for metric, of in (("correlation", rank_correlations), ("recall", lambda x: recalls(x, k))):
        row[metric] = float(of(mean)[0])
        low, high = interval(of(draws)) if len(scored) > 1 else (math.nan, math.nan)
        row[f"{metric}_low"], row[f"{metric}_high"] = float(low), float(high)
    costs = [t.forwards[name] for t in scored if name in t.forwards]
    row["forwards"] = sum(costs) / len(costs) if costs else math.nan
    return row


def rank_correlations(pairs: Float[Tensor, "draw 2 head"]) -> Float[Tensor, " draw"]:
    """Spearman's rank correlation of each pair of maps; NaN where one is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(pairs.double().numpy(), axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(-1)).prod(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return torch.from_numpy((ranks[:, 0] * ranks[:, 1]).sum(-1) / norms).float()


def recalls(pairs: Float[Tensor, "draw 2 head"], k: int) -> Float[Tensor, " draw"]:
    """Share of the k largest of the second map among the k largest of the first."""
    k = min(k, pairs.shape[-1])
    order = pairs.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return (order[:, 0, :, None] == order[:, 1, None, :]).any(-1).float().mean(-1)


def write_natural_leaderboard(
    trials: Sequence[NaturalTrial], folder: str | Path, *, k: int = K, seed: int = 0
) -> list[Path]:
    """Write `natural.parquet`, `natural.json`, `natural.md` and `natural.html`.

    Args:
        trials: see `read_natural_trials`.
        folder: where to write.
        k: number of heads that recall counts.
        seed: seed of the bootstrap.

    Returns:
        The files written.
    """
    from memcircuits.display.pages import Page, Prose, Table

    folder = Path(folder)
    frame = natural_leaderboard(trials, k=k, seed=seed)
    tables = natural_tables(frame, k)
    parquet = io.BytesIO()
    frame.to_parquet(parquet, index=False)
    page = Page(
        "Who finds what training wrote?",
        [
            Prose(natural_notes(trials), title="What was run"),
            *(Table(table, title=title) for title, table in tables.items()),
        ],
        lead="Two models were trained alike but for some paragraphs; exchanging their heads, one "
        "at a time, tells which heads hold these paragraphs. How well does each method agree?",
    )
    text = "\n".join(f"- {note}" for note in natural_notes(trials)) + "\n\n"
    text += "\n\n".join(f"**{title}**\n\n{markdown(table)}" for title, table in tables.items())
    return [
        write_atomically(folder / "natural.parquet", parquet.getvalue()),
        write_atomically(folder / "natural.json", frame.to_json(orient="records", indent=1) + "\n"),
        write_atomically(folder / "natural.md", text + "\n"),
        page.save(folder / "natural.html"),
    ]


def natural_notes(trials: Sequence[NaturalTrial]) -> list[str]:
    """How many trials there are of each direction, and how much is remembered."""
    notes = []
    for direction in DIRECTIONS:
        of_direction = [trial for trial in trials if trial.direction == direction]
        if of_direction:
            n = sum(len(trial.paragraphs) for trial in of_direction)
            total = sum(trial.total for trial in of_direction) / len(of_direction)
            notes.append(
                f"{direction}: {len(of_direction)} trials, {n} paragraphs that it recites in full "
                f"and the other at most a tenth of; {total:.2f} nats/token remembered. Intervals "
                "are over trials."
            )
    return notes


def natural_tables(frame: pd.DataFrame, k: int = K) -> dict[str, pd.DataFrame]:
    """Title -> a table of text: agreement with one truth, the two directions side by side."""
    import pandas as pd

    tables = {}
    for measure in MEASURES:
        of_truth = frame[frame["truth"] == measure]
        table = pd.DataFrame({"localizer": list(dict.fromkeys(of_truth["localizer"]))})
        is_reference = table["localizer"].isin(REFERENCES)
        table["localizer"] = table["localizer"].where(~is_reference, table["localizer"] + " *")
        for direction in DIRECTIONS:
            rows = of_truth[of_truth["direction"] == direction].set_index("localizer")
            for metric, label in (("correlation", "correlation"), ("recall", f"recall@{k}")):
                table[f"{label}, {direction}"] = [
                    _cell(rows, name.removesuffix(" *"), metric) for name in table["localizer"]
                ]
        tables[f"Agreement with {measure} of each head's weights (* reference)"] = table
    return tables


def _cell(rows: pd.DataFrame, name: str, metric: str) -> str:
    if name not in rows.index or math.isnan(rows.loc[name, metric]):
        return ""
    row = rows.loc[name]
    return f"{row[metric]:.2f} [{row[f'{metric}_low']:.2f}, {row[f'{metric}_high']:.2f}]"


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, frame.columns))} |", "|" + " --- |" * len(frame.columns)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)
