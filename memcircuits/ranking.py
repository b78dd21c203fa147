"""Which heads does the recitation hang on? The argument of the paper, with controls and intervals.

Given paragraphs, the model says by itself which it recites (EM, `memcircuits.scanning`). For each
head, three kinds of evidence are gathered, on memorized paragraphs and on controls that are not:

1. *Causal* (`memcircuits.ablation`): how much worse does the model predict the memorized
   continuations without the head, and is that more than for controls? Nats/token and EM.
2. *Weights* (`memcircuits.gradients`): how large are the gradients of the loss on memorized
   paragraphs in the head's four matrices (equation 2)?
3. *Attention* (`memcircuits.attention`): does it attend to rare prefix tokens (section 5.4)?

The score is the causal one, memorized minus control, because only that one says what the recitation
*needs*; the others stand beside it. Paragraphs are resampled for the interval and their labels
permuted for the p-value; a head stands out when it does so after Benjamini-Hochberg correction over
all heads, and where none does the ranking says that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.ablation import Ablation
from memcircuits.adapter import Head, adapt
from memcircuits.attention import rare_token_attention
from memcircuits.checks import InputError, at_least, one_of
from memcircuits.gradients import parameter_gradients
from memcircuits.paragraphs import Paragraphs
from memcircuits.results import Provenance, Result, ScoreMap, write_atomically
from memcircuits.scanning import Scan, scan
from memcircuits.screening import METHODS, head_effects
from memcircuits.statistics import (
    benjamini_hochberg,
    bootstrap_means,
    finite_rows,
    left_out,
    permuted_differences,
)
from memcircuits.unigrams import UnigramTable

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANCE = 0.05
_FEW = 20  # with fewer paragraphs no head need stand out
_CONTROLS = 20  # at least, where there are so many: few labels leave no room for small p-values


@dataclass(frozen=True)
class Ranking(Result, kind="ranking"):
    """All heads, ranked by how much more memorized paragraphs need them than controls do.

    Attributes:
        score: memorized minus control ablation effect, nats/token, [layer, head].
        ci: 95 % bootstrap interval over paragraphs, [bound, layer, head].
        p_value: one-sided label permutation, [layer, head].
        evidence: column -> [layer, head].
        memorized_ids: the memorized paragraphs measured, [paragraph, pos].
        control_ids: the controls measured, [paragraph, pos].
        names: names of both.
        n_prefix: tokens of the prefix.
        layer_share: lower-half gradient share of memorized and control paragraphs.
        layer_gradients: set -> gradient sum per layer, memorized and control.
        counts: how many paragraphs were given, memorized, controls, measured, not finite.
        notes: what the reader must know.
        provenance: where the numbers come from.
        model: the model, kept for `attention` and `to_html`; not saved.
        unigrams: the table that defined rarity, kept to colour tokens; not saved.
        seconds: how long it took; not saved, so that equal rankings are equal files.
    """

    score: Float[Tensor, "layer head"]
    ci: Float[Tensor, "bound layer head"]
    p_value: Float[Tensor, "layer head"]
    evidence: Mapping[str, Float[Tensor, "layer head"]]
    memorized_ids: Tensor
    control_ids: Tensor
    names: Mapping[str, tuple[str, ...]]
    n_prefix: int
    layer_share: Mapping[str, float]
    layer_gradients: Mapping[str, Float[Tensor, " layer"]]
    counts: Mapping[str, int]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    model: Any = field(default=None, repr=False, compare=False, metadata={"saved": False})
    unigrams: Any = field(default=None, repr=False, compare=False, metadata={"saved": False})
    seconds: float | None = field(default=None, compare=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def q_value(self) -> Float[Tensor, "layer head"]:
        """p-values after Benjamini-Hochberg correction over all heads."""
        return benjamini_hochberg(self.p_value)

    @property
    def stands_out(self) -> Tensor:
        """Heads with q < 0.05, [layer, head]."""
        return self.q_value < SIGNIFICANCE

    @property
    def memorized(self) -> Paragraphs:
        """The memorized paragraphs that were measured."""
        return Paragraphs(self.memorized_ids, self.n_prefix, tuple(self.names["memorized"]))

    @property
    def control(self) -> Paragraphs:
        """The controls that were measured."""
        return Paragraphs(self.control_ids, self.n_prefix, tuple(self.names["control"]))

    @property
    def scores(self) -> ScoreMap:
        """The score as a `ScoreMap`."""
        return ScoreMap("memorization score", "nats/token", self.score, self.provenance)

    def top(self, k: int = 10) -> list[Head]:
        """The `k` highest-ranked heads."""
        at_least("k", k, 1)
        return self.scores.top(k)

    def to_frame(self) -> pd.DataFrame:
        """One row per head, best first.

        Columns `layer, head, rank, score, ci_low, ci_high, p_value, q_value, stands_out` and one
        per kind of evidence.
        """
        import numpy as np

        frame = self.scores.to_frame().rename(columns={"value": "score"})
        columns = {
            "ci_low": self.ci[0],
            "ci_high": self.ci[1],
            "p_value": self.p_value,
            "q_value": self.q_value,
            "stands_out": self.stands_out,
            **self.evidence,
        }
        for name, values in columns.items():
            frame[name] = values.flatten().numpy()
        frame = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
        frame.insert(2, "rank", np.arange(1, len(frame) + 1))
        return frame

    def figure(self) -> Any:
        """A layer x head heatmap of the score (plotly)."""
        from memcircuits import figures

        return figures.heatmap(
            self.score,
            title="Memorization score: loss without the head, memorized minus control",
            name="score",
            units="nats/token",
            marks=self.stands_out,
        )

    def attention(
        self, paragraph: Any, *, heads: int = 4, compare: Any = None, model: Any = None
    ) -> Any:
        """Attention of the best heads on one paragraph, see `memcircuits.attention_view`.

        Args:
            paragraph: one paragraph, such as `ranking.memorized[0]`.
            heads: how many of the best heads.
            compare: a second paragraph shown beside it, such as the perturbed one.
            model: needed by a loaded ranking, which has none.
        """
        from memcircuits.views import attention_view

        return attention_view(
            self._model(model),
            paragraph,
            heads=self.top(min(heads, self.score.numel())),
            compare=compare,
            unigrams=self.unigrams,
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        heads: int = 6,
        triggers: int = 3,
        model: Any = None,
        progress: bool = True,
    ) -> Path:
        """Write the self-contained report, see `memcircuits.report`.

        Args:
            path: the HTML file.
            heads: how many of the best heads to show the attention of.
            triggers: for how many paragraphs to find the prefix tokens that trigger them, which
                takes a forward pass of each for every prefix token; 0 leaves the section out.
            model: needed by a loaded ranking, which has none.
            progress: show a bar on stderr.
        """
        from memcircuits.report import ranking_page

        page = ranking_page(
            self, self._model(model), heads=heads, triggers=triggers, progress=progress
        )
        return page.save(Path(path))

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the table, counts and provenance as JSON."""
        data = {
            "schema": "memcircuits.ranking/1",
            "summary": self.summary(),
            "counts": dict(self.counts),
            "layer_share": dict(self.layer_share),
            "notes": list(self.notes),
            "heads": json.loads(self.to_frame().to_json(orient="records", double_precision=10)),
            "provenance": dataclasses.asdict(self.provenance),
        }
        return write_atomically(path, json.dumps(data, indent=1) + "\n")

    def summary(self) -> str:
        """One sentence: which heads stand out."""
        n = int(self.stands_out.sum())
        sets = f"{self.counts['measured']} memorized paragraphs against as many controls"
        if self.counts["measured_control"] != self.counts["measured"]:
            sets = (
                f"{self.counts['measured']} memorized paragraphs against "
                f"{self.counts['measured_control']} controls"
            )
        if not n:
            text = f"No head stands out ({sets}, q < {SIGNIFICANCE})."
            if self.counts["measured"] < _FEW:
                text += " So few paragraphs can hardly reach that: read the order and intervals."
            return text
        ranked = [h for h in self.scores.top(self.score.numel()) if self.stands_out[h]]
        best = ", ".join(str(h) for h in ranked[:5])
        more = f" and {n - 5} more" if n > 5 else ""
        total = self.score.numel()
        return f"{n} of {total} heads stand out ({sets}, q < {SIGNIFICANCE}): {best}{more}."

    def _model(self, model: Any) -> Any:
        found = self.model if model is None else model
        if found is None:
            raise InputError("model", "None", "a loaded ranking has no model: pass model=")
        return found

    def __str__(self) -> str:
        return self.summary()


def find_memorization_heads(
    model: Any,
    paragraphs: Any,
    *,
    control: Any = None,
    unigrams: UnigramTable | None = None,
    mode: str = "zero",
    method: str = "exact",
    max_paragraphs: int | None = 100,
    match_nll: bool = False,
    draws: int = 2000,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank all heads by how much the recitation of memorized paragraphs hangs on them.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids. Those with EM equal to
            the continuation's length are the memorized set.
        control: paragraphs not memorized; by default those of `paragraphs` with a low EM.
        unigrams: token counts that define rarity; by default counted in the given paragraphs.
        mode: ablation, `zero`, `mean` or `resample`; the latter two draw on the controls.
        method: `exact` ablates every head. `screen` (`memcircuits.screening`) is several times
            faster on models with many heads: it estimates all of them, ablates the best ones and
            some at random, and says in `notes` what it may have missed. Heads that were not ablated
            have an estimate as their score, no interval, p = 1 and `verified` False.
        max_paragraphs: measure at most so many memorized paragraphs and so many controls, drawn by
            `seed`; of controls found among `paragraphs` as many as of memorized ones, but at least
            20. None: all.
        match_nll: take the controls whose NLL is nearest to the memorized paragraphs' mean instead
            of drawing them; `notes` says how near they are.
        draws: bootstrap resamples and label permutations.
        seed: of all draws.
        memory_budget: bytes that one batch may take.
        progress: show bars on stderr.

    Returns:
        A `Ranking` over all layers and heads.

    Raises:
        InputError: if no paragraph is memorized, fewer than two controls are at hand,
            all numbers are non-finite, or the paragraphs do not fit the model.

    Example:
        >>> ranking = mc.find_memorization_heads(model, memorized[:2], control=control, draws=100)
        >>> frame = ranking.to_frame()  # one row per head, best first
        >>> len(frame), mc.Head(*frame.loc[0, ["layer", "head"]]) == ranking.top(1)[0]
        (48, True)
    """
    started = time.monotonic()
    adapter = adapt(model)
    given = Paragraphs.of(paragraphs, model)
    at_least("draws", draws, 1)
    one_of("method", method, METHODS)
    if max_paragraphs is not None:
        at_least("max_paragraphs", max_paragraphs, 2)
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
    found = scan(model, given, memory_budget=memory_budget, progress=progress)
    memorized = _memorized(found)
    own_control = control is None
    among = found  # the scan that holds the controls
    if control is None:
        controls = found.control
        if controls is None or len(controls) < 2:
            found_controls = 0 if controls is None else len(controls)
            raise InputError(
                "paragraphs",
                f"{found_controls} controls among {len(given)} paragraphs",
                "at least two must not be memorized; add some or pass control=",
            )
    else:
        controls = Paragraphs.of(control, model, "control")
        among = scan(model, controls, memory_budget=memory_budget, progress=progress)
        controls = _finite(among)
        if len(controls) < 2:
            raise InputError("control", "fewer than two usable paragraphs", "give at least two")
    _refuse_overlap(memorized, controls)
    generator = torch.Generator().manual_seed(seed)
    counts = {
        "given": len(given),
        "memorized": len(memorized),
        "control": len(controls),
        "not_finite": int((~found.finite).sum()),
    }
    memorized = _draw(memorized, max_paragraphs, generator)
    limit = max_paragraphs
    if own_control:
        limit = max(_CONTROLS, min(len(memorized), max_paragraphs or len(memorized)))
    notes: list[str] = []
    if match_nll:
        controls, note = _nearest(found, memorized, among, controls, limit)
        notes.append(note)
    else:
        controls = _draw(controls, limit, generator)
    counts |= {"measured": len(memorized), "measured_control": len(controls)}
    if unigrams is None:
        unigrams = UnigramTable.from_tokens(
            given.ids, adapter.d_vocab, source="the given paragraphs"
        )
        notes.append("No unigram table was given: rarity is counted in the given paragraphs.")
    if len(memorized) == 1:
        notes.append(
            "One memorized paragraph: the intervals show how the controls vary, not the paragraphs."
        )
    if counts["not_finite"]:
        notes.append(f"{counts['not_finite']} paragraphs had non-finite numbers and were left out.")
    if adapter.dtype in (torch.float16, torch.bfloat16):
        notes.append("Half precision: near-ties may decide exact matches differently.")

    options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    ablated = head_effects(
        Ablation(
            model, memorized, mode=mode, reference=None if mode == "zero" else controls, seed=seed
        ),
        Ablation(model, controls, mode=mode, seed=seed),
        method=method,
        seed=seed,
        **options,
    )
    notes += ablated.notes
    gradients = {
        name: parameter_gradients(model, group, **options)
        for name, group in {"memorized": memorized, "control": controls}.items()
    }
    rare = rare_token_attention(model, memorized, unigrams, seed=seed, progress=progress)

    # An ablation may overflow where the whole model does not.
    finite = {name: finite_rows(rows) for name, rows in ablated.nll.items()}
    for name, rows in finite.items():
        notes += [f"{name}: {note}" for note in left_out(rows)]
        if rows.sum() < (1 if name == "memorized" else 2):
            raise InputError(name, "non-finite numbers when heads are ablated", "use float32")
    effect = {name: rows[finite[name]] for name, rows in ablated.nll.items()}
    em = {name: rows[finite[name]] for name, rows in ablated.em.items()}
    score = effect["memorized"].mean(0) - effect["control"].mean(0)
    resampled = bootstrap_means(effect["memorized"], draws, generator) - bootstrap_means(
        effect["control"], draws, generator
    )
    null = permuted_differences(effect["memorized"], effect["control"], draws, generator)
    evidence = {
        "ablation_memorized": effect["memorized"].mean(0),
        "ablation_control": effect["control"].mean(0),
        "em_memorized": em["memorized"].mean(0),
        "em_control": em["control"].mean(0),
        "gradient": gradients["memorized"].per_head(adapter.n_heads),
        "gradient_control": gradients["control"].per_head(adapter.n_heads),
        "rare_token_tau": rare.values,
        "rare_token_p": rare.p_value,
        "verified": ablated.verified,
    }
    ci = torch.quantile(resampled, torch.tensor([0.025, 0.975]), dim=0)
    p_value = (1 + (null >= score).sum(0)) / (1 + draws)
    return Ranking(
        score=score,
        ci=ci.where(ablated.verified, torch.nan),
        p_value=p_value.where(ablated.verified, 1.0),
        evidence=evidence,
        memorized_ids=memorized.ids,
        control_ids=controls.ids,
        names={"memorized": memorized.names, "control": controls.names},
        n_prefix=given.n_prefix,
        layer_share={name: result.layer_share() for name, result in gradients.items()},
        layer_gradients={name: result.layers for name, result in gradients.items()},
        counts=counts,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": given, "memorized": memorized, "control": controls},
            mode=mode,
            method=method,
            max_paragraphs=max_paragraphs,
            match_nll=match_nll,
            draws=draws,
            seed=seed,
            control="of the paragraphs" if own_control else "given",
            unigrams=unigrams.source,
        ),
        notes=tuple(notes),
        model=model,
        unigrams=unigrams,
        seconds=time.monotonic() - started,
    )


def _memorized(found: Scan) -> Paragraphs:
    if not found.finite.any():
        raise InputError(
            "model", "non-finite logits on every paragraph", "load it in float32, check its weights"
        )
    memorized = found.memorized
    n = found.token_correct.shape[1]
    if memorized is None:
        raise InputError(
            "paragraphs",
            f"none of {len(found.em)} is memorized (largest EM {int(found.em.max())} of {n})",
            "give paragraphs that the model recites, or a shorter n_continuation",
        )
    return memorized


def _finite(found: Scan) -> Paragraphs:
    if not found.finite.any():
        raise InputError(
            "control", "non-finite logits on every paragraph", "load the model in float32"
        )
    return found.paragraphs[found.finite]


def _refuse_overlap(memorized: Paragraphs, control: Paragraphs) -> None:
    shared = set(map(tuple, memorized.ids.tolist())) & set(map(tuple, control.ids.tolist()))
    if shared:
        raise InputError(
            "control",
            f"{len(shared)} of its paragraphs are in the memorized set",
            "controls must be other paragraphs",
        )


def _draw(paragraphs: Paragraphs, limit: int | None, generator: torch.Generator) -> Paragraphs:
    if limit is None or len(paragraphs) <= limit:
        return paragraphs
    chosen = torch.randperm(len(paragraphs), generator=generator)[:limit]
    return paragraphs[chosen.sort().values]


def _nearest(
    found: Scan, memorized: Paragraphs, among: Scan, controls: Paragraphs, limit: int | None
) -> tuple[Paragraphs, str]:
    """The controls whose NLL is nearest to the memorized paragraphs' mean, and how near it is."""

    def nll(scanned: Scan, some: Paragraphs) -> Float[Tensor, " paragraph"]:
        of = dict(zip(map(tuple, scanned.paragraphs.ids.tolist()), scanned.nll, strict=True))
        return torch.stack([of[tuple(row)] for row in some.ids.tolist()])

    target, own = nll(found, memorized).mean(), nll(among, controls)
    chosen = (own - target).abs().argsort(stable=True)[:limit].sort().values
    note = (
        f"Controls are those nearest in NLL: {float(own[chosen].mean()):.2f} nats/token on average "
        f"against {float(target):.2f} of the memorized paragraphs."
    )
    return controls[chosen], note
