"""What should a ranking of heads estimate? Candidates that need no twin, tried against one.

Zero ablation gives the effect of every head on every paragraph: the rise of the NLL (nats/token),
the fall of the mean margin of the true token (logits), and the tokens of EM lost. A candidate turns
the effects of two sets, paragraphs that were trained on and texts that were not, into one score per
head:

* *main effects* are differences of mean effects. Confident text has more to lose in every head, so
  they are large for all heads wherever the sets differ in confidence;
* *shares* are differences of each head's share of the effect: effects of each set are divided by
  their mean over heads and paragraphs first (the interaction of head and set).

The texts that were not trained on are either text of the same kind (`text`), or the model's own
greedy continuation of its prefixes (`own`), of which the model is sure although it recites nothing;
`matched` pairs paragraphs of equal clean margin.

`compare_estimands` asks of each candidate: do its heads agree with transplants, does it name heads
where there is nothing to name (own text against other own text), does it tell trained paragraphs
from confident ones (AUC), does it follow remembered bits, and does it grow with the number of
repetitions at equal margin? The memorized paragraphs are divided into halves: one to choose a
candidate on, one to report it on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.progress import bar
from memcircuits.benchmark.natural import K, rank_correlations, recalls
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Model
from memcircuits.models.batching import map_batches
from memcircuits.models.registry import adapt

if TYPE_CHECKING:
    import pandas as pd

Scale = Literal["nll", "margin", "em"]
"""What an effect is measured in."""

SCALES: dict[Scale, int] = {"nll": 0, "margin": 1, "em": 2}

_MAX_PARAGRAPHS = 16  # whose clean run is held at once
_CALIPER = 0.25  # standard deviations of the margin between the paragraphs of a pair
_LEAST = 5  # paragraphs of a set: fewer say nothing


@dataclass(frozen=True)
class Estimand:
    """A way to score heads.

    Attributes:
        name: what it is called in tables.
        scale: what effects are measured in.
        against: texts that were not trained on, `text` or `own`.
        share: whether each set's effects are divided by their mean.
        matched: whether paragraphs are paired by their clean margin.
    """

    name: str
    scale: Scale
    against: Literal["text", "own"]
    share: bool = False
    matched: bool = False


ESTIMANDS = (
    Estimand("NLL, trained - text", "nll", "text"),
    Estimand("NLL, trained - own text", "nll", "own"),
    Estimand("NLL, trained - own text, matched", "nll", "own", matched=True),
    Estimand("margin, trained - own text", "margin", "own"),
    Estimand("EM, trained - own text", "em", "own"),
    Estimand("share of NLL, trained - own text", "nll", "own", share=True),
    Estimand("share of margin, trained - own text", "margin", "own", share=True),
    Estimand("share of margin, matched", "margin", "own", share=True, matched=True),
)
"""The candidates; the first one is the difference of mean effects on the NLL."""


class HeadEffects(NamedTuple):
    """Effects of removing each head from some paragraphs.

    Attributes:
        values: rise of NLL, fall of margin, EM lost.
        margin: mean margin of the true tokens of the unedited run, logits.
        names: the paragraphs' names.
    """

    values: Float[Tensor, "paragraph head scale"]
    margin: Float[Tensor, " paragraph"]
    names: tuple[str, ...]

    def rows(self, index: Any) -> HeadEffects:
        """Some of the paragraphs."""
        chosen = torch.arange(len(self.margin))[index].tolist()
        names = tuple(self.names[i] for i in chosen)
        return HeadEffects(self.values[chosen], self.margin[chosen], names)


def head_effects(model: Model, paragraphs: Paragraphs, *, progress: bool = True) -> HeadEffects:
    """Zero-ablate every head, and measure NLL, margin and EM of every paragraph.

    Args:
        model: the model.
        paragraphs: the paragraphs.
        progress: show a bar on stderr.
    """
    adapter = adapt(model)

    def measure_batch(rows: slice) -> Float[Tensor, "paragraph run scale"]:
        run = ResumableRun(adapter, paragraphs[rows])

        def measure(logits: Tensor, batch: Int[Tensor, " batch"]) -> Tensor:
            targets = run.targets[batch]
            scores = read_continuation(logits, targets)
            true = logits.float().gather(-1, targets[..., None])
            others = logits.float().scatter(-1, targets[..., None], -math.inf).amax(-1)
            margin = (true[..., 0] - others).mean(-1)
            return torch.stack([scores.nll, margin, scores.em.float()], -1)

        results = [run.clean(measure)[None]]
        for layer in range(adapter.n_layers):
            zero = torch.zeros_like(run.z[layer][:1, :1, :1])
            edits = [HeadEdit((head,), zero) for head in range(adapter.n_heads)]
            results.append(run.edited(layer, edits, measure))
        progress_bar.update(rows.stop - rows.start)
        return torch.cat(results).transpose(0, 1).float().cpu()

    with (
        adapter.preserving_state(),
        bar(len(paragraphs), "head effects", progress=progress) as progress_bar,
    ):
        runs = map_batches(len(paragraphs), _MAX_PARAGRAPHS, measure_batch)
    sign = torch.tensor([1.0, -1.0, -1.0])
    return HeadEffects((runs[:, 1:] - runs[:, :1]) * sign, runs[:, 0, 1], paragraphs.names)


def scaled(effects: HeadEffects, estimand: Estimand) -> Float[Tensor, "paragraph head"]:
    """The effects that an estimand compares."""
    values = effects.values[..., SCALES[estimand.scale]]
    return values / values.mean() if estimand.share else values


def score_heads(
    trained: HeadEffects, untrained: HeadEffects, estimand: Estimand
) -> Float[Tensor, " head"]:
    """The score of every head; NaN if no paragraphs could be matched."""
    pair = _sets(trained, untrained, estimand)
    if pair is None:
        return torch.full(trained.values.shape[1:2], torch.nan)
    return pair[0].mean(0) - pair[1].mean(0)


def significant_heads(
    trained: HeadEffects,
    untrained: HeadEffects,
    estimand: Estimand,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[int, int]:
    """Number of heads whose score is significantly above, and below, zero.

    A permutation test of the labels with the largest |t| over all heads as its statistic, so that
    with probability 0.95 no head is named where the sets do not differ.

    Args:
        trained: effects of one set.
        untrained: effects of the other.
        estimand: how they are compared.
        draws: number of permutations.
        seed: seed of the permutations.
    """
    pair = _sets(trained, untrained, estimand)
    if pair is None:
        return 0, 0
    pooled, n = torch.cat(pair).double(), len(pair[0])
    generator = torch.Generator().manual_seed(seed)
    observed = _t(pooled, torch.arange(len(pooled))[None], n)[0]
    order = torch.rand(draws, len(pooled), generator=generator).argsort(-1)
    largest = _t(pooled, order, n).abs().amax(-1)
    p = (1 + (largest[:, None] >= observed.abs()).sum(0)) / (draws + 1)
    named = p < 0.05
    return int((named & (observed > 0)).sum()), int((named & (observed < 0)).sum())


def _t(
    pooled: Float[Tensor, "paragraph head"], order: Int[Tensor, "draw paragraph"], n: int
) -> Float[Tensor, "draw head"]:
    """Welch's t of the first `n` paragraphs of each order against the others."""
    weights = torch.zeros(order.shape, dtype=pooled.dtype)
    weights.scatter_(1, order[:, :n], 1.0)
    parts = []
    for inside, size in ((weights, n), (1 - weights, len(pooled) - n)):
        mean = inside @ pooled / size
        variance = (inside @ pooled.square() / size - mean.square()).clamp_min(0)
        parts.append((mean, variance / max(1, size - 1)))
    (mean, spread), (other, other_spread) = parts
    return (mean - other) / (spread + other_spread).sqrt().clamp_min(1e-12)


def _sets(
    trained: HeadEffects, untrained: HeadEffects, estimand: Estimand
) -> tuple[Tensor, Tensor] | None:
    """Scaled effects of both sets, in matched pairs where the estimand asks for it."""
    if estimand.matched:
        pairs = matched_pairs(trained.margin, untrained.margin)
        if len(pairs) < _LEAST:
            return None
        trained, untrained = (s.rows(pairs[:, i]) for i, s in enumerate((trained, untrained)))
    return scaled(trained, estimand), scaled(untrained, estimand)


def matched_pairs(
    first: Float[Tensor, " paragraph"], second: Float[Tensor, " other"]
) -> Int[Tensor, "pair 2"]:
    """Pairs of paragraphs of about equal margin, the closest first; each is in one pair at most."""
    distance = (first[:, None] - second).abs()
    limit = _CALIPER * float(torch.cat([first, second]).std())
    pairs: list[tuple[int, int]] = []
    used: tuple[set[int], set[int]] = set(), set()
    for flat in distance.flatten().argsort(stable=True).tolist():
        i, j = divmod(flat, len(second))
        if distance[i, j] > limit:
            break
        if i not in used[0] and j not in used[1]:
            pairs.append((i, j))
            used[0].add(i)
            used[1].add(j)
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


class EffectSets(NamedTuple):
    """Effects of the sets that the candidates are tried on, and what is known of them.

    Attributes:
        trained: paragraphs that the model was trained on and recites in full.
        own: the model's own continuations of prefixes that no training holds.
        text: paragraphs that no training holds.
        dosed: paragraphs of every number of repetitions.
        repetitions: how often each of `dosed` was seen.
        remembered: remembered bits/token of each of `dosed`.
        truth: necessity or sufficiency -> effect of transplanting each head, on `trained`.
    """

    trained: HeadEffects
    own: HeadEffects
    text: HeadEffects
    dosed: HeadEffects
    repetitions: Float[Tensor, " dosed"]
    remembered: Float[Tensor, " dosed"]
    truth: dict[str, Float[Tensor, "trained head"]]


def compare_estimands(sets: EffectSets, *, k: int = K, seed: int = 0) -> pd.DataFrame:
    """Try every candidate on both halves of the memorized paragraphs.

    Args:
        sets: the effects.
        k: number of heads that recall counts.
        seed: seed of the division into halves and of the permutations.

    Returns:
        One row per half (`choose`, `report`) and estimand: `n` paragraphs, `above` and `below`
        (heads significantly above and below zero), `null` (heads named between two halves of the
        own texts, where there is nothing to name), for each truth `correlation_...` and
        `recall_...`, `auc` (trained against own text), `bits` and `dose` (rank correlations over
        the dosed paragraphs, `dose` at equal margin). Paragraphs are scored by the heads that the
        estimand finds on the other half.
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)
    halves = torch.randperm(len(sets.trained.margin), generator=generator).chunk(2)
    own_halves = torch.randperm(len(sets.own.margin), generator=generator).chunk(2)
    rows = []
    for i, name in enumerate(("choose", "report")):
        trained, other = sets.trained.rows(halves[i]), sets.trained.rows(halves[1 - i])
        for estimand in ESTIMANDS:
            untrained = sets.own if estimand.against == "own" else sets.text
            score = score_heads(trained, untrained, estimand)
            above, below = significant_heads(trained, untrained, estimand, seed=seed)
            first, second = (sets.own.rows(half) for half in own_halves)
            null = significant_heads(first, second, estimand, seed=seed)
            row: dict[str, Any] = {"half": name, "estimand": estimand.name, "n": len(halves[i])}
            row |= {"above": above, "below": below, "null": sum(null)}
            for truth, effects in sets.truth.items():
                pair = torch.stack([score, effects[halves[i]].mean(0)])[None]
                row[f"correlation_{truth}"] = float(rank_correlations(pair)[0])
                row[f"recall_{truth}"] = float(recalls(pair, k)[0])
            if score.isnan().any():
                row |= {f"recall_{truth}": math.nan for truth in sets.truth}
            weights = score_heads(other, untrained, estimand)
            rows.append(row | _of_paragraphs(sets, trained, estimand, weights))
    return pd.DataFrame(rows)


def _of_paragraphs(
    sets: EffectSets, trained: HeadEffects, estimand: Estimand, weights: Float[Tensor, " head"]
) -> dict[str, float]:
    """How well the effect on the heads that an estimand names tells paragraphs apart."""

    def statistic(effects: HeadEffects) -> np.ndarray:
        values = effects.values[..., SCALES[estimand.scale]].double()
        if estimand.share:
            values = values / values.mean(-1, keepdim=True)
        return (values @ weights.double()).numpy()

    if weights.isnan().any():
        return {"auc": math.nan, "bits": math.nan, "dose": math.nan}
    dosed = statistic(sets.dosed)
    dose = (1 + sets.repetitions.double()).log2().numpy()
    return {
        "auc": _auc(statistic(trained), statistic(sets.own)),
        "bits": _partial(dosed, sets.remembered.double().numpy(), None),
        "dose": _partial(dosed, dose, sets.dosed.margin.double().numpy()),
    }


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a trained paragraph has the larger statistic; ties count one half."""
    from scipy.stats import rankdata

    ranks, n = rankdata(np.concatenate([positive, negative])), len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def _partial(first: np.ndarray, second: np.ndarray, held: np.ndarray | None) -> float:
    """Rank correlation, with a third quantity held fixed by a regression of the ranks on its."""
    from scipy.stats import rankdata

    columns = [rankdata(x) for x in (first, second)]
    columns = [x - x.mean() for x in columns]
    if held is not None:
        fixed = rankdata(held) - (len(held) + 1) / 2
        columns = [x - fixed * (x @ fixed) / max(fixed @ fixed, 1e-12) for x in columns]
    norm = math.sqrt((columns[0] @ columns[0]) * (columns[1] @ columns[1]))
    return float(columns[0] @ columns[1] / norm) if norm > 1e-9 else math.nan
