"""What did an edit do? To its targets, to controls that it never saw, and under attack.

* Targets: EM, NLL, bits, share of tokens still greedy, and whether sampling still finds the text.
* Others: what else the model recites. An edit that cuts one text out may cut others with it.
* Controls: EM of the model's own greedy continuations (complete before any edit, by definition),
  KL(original || edited) along them, NLL of the true text.
* Held-out text: perplexity.
* Attacks: the prefix, or others with random tokens replaced, of which the best is taken, since an
  edit may only have broken the one known way in; and relearning (`recovery_curve`): how many steps
  of training on *other* paragraphs bring back those that were forgotten and are not trained on?

Only controls and texts that `unlearn` was not given say anything about what else was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.statistics import DRAWS, bootstrap_interval, bootstrap_means, interval
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.edit import Edit
from memcircuits.measure.continuation import (
    continuation_log_probs,
    kl_divergence,
    read_continuation,
)
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


UNITS = {
    "em": "tokens",
    "em_attacked": "tokens",
    "nll": "nats/token",
    "bits": "bits",
    "loose_match": "share of tokens",
    "extraction": "probability",
    "in_full": "share of paragraphs",
    "kl": "nats/token",
    "perplexity": "perplexity",
}


_SETS = {"control/em": "control, own text", "control/kl": "control, own text"}


@dataclass(frozen=True)
class EditReport(Result, kind="edit-report"):
    """Measures before and after an edit.

    Attributes:
        samples: `set/measure` -> [moment, paragraph], the moments before and after.
        n_samples: samples that `extraction` allows.
        provenance: where the numbers come from.
    """

    samples: Mapping[str, Float[Tensor, "moment paragraph"]]
    n_samples: int
    provenance: Provenance

    def mean(self, name: str) -> tuple[float, float]:
        """Before and after, mean over paragraphs, for instance of `memorized/em`."""
        if name not in self.samples:
            raise InputError("name", repr(name), "choose one of " + ", ".join(self.samples))
        before, after = self.samples[name].double().mean(-1).tolist()
        return before, after

    def to_frame(self) -> pd.DataFrame:
        """Columns `set, measure, units, before, after, change, ci_low, ci_high, n`.

        The interval is that of the mean change, 95 %, over paragraphs; none of a single one.
        Perplexity is the exponential of the mean NLL. `control, own text` is what the model itself
        writes after the controls' prefixes.
        """
        import pandas as pd

        rows = []
        for name, (before, after) in self.samples.items():
            group, _, measure = name.partition("/")
            n = len(before)
            generator = torch.Generator().manual_seed(0)
            draws = bootstrap_means(torch.stack([before, after], -1), DRAWS, generator)
            moments = torch.stack([before.mean(), after.mean()])
            if measure == "perplexity":
                draws, moments = draws.exp(), moments.exp()
            low, high = interval(draws[:, 1] - draws[:, 0]).tolist()
            if n == 1:
                low = high = math.nan
            rows.append(
                {
                    "set": _SETS.get(name, group),
                    "measure": measure,
                    "units": UNITS[measure],
                    "before": float(moments[0]),
                    "after": float(moments[1]),
                    "change": float(moments[1] - moments[0]),
                    "ci_low": low,
                    "ci_high": high,
                    "n": n,
                }
            )
        return pd.DataFrame(rows)

    def figure(self) -> Any:
        """EM before and after, of targets and controls (plotly; the paper's figure 5)."""
        from memcircuits.display import figures

        return figures.arms(
            edit_arms({"before": self, "after": self}),
            title="Recitation before and after the edit",
        )

    def __str__(self) -> str:
        em = self.mean("memorized/em")
        own, kl = self.mean("control/em"), self.mean("control/kl")
        text = f"memorized EM {em[0]:.1f} -> {em[1]:.1f}, "
        if "memorized/em_attacked" in self.samples:
            text += f"with other prefixes {self.mean('memorized/em_attacked')[1]:.1f}, "
        if "others/in_full" in self.samples:
            kept = self.samples["others/in_full"]
            text += f"others still recited {int(kept[1].sum())} of {int(kept[0].sum())}, "
        return (
            f"{text}controls' own continuations {own[0]:.1f} -> {own[1]:.1f} tokens, "
            f"KL {kl[1]:.2g} nats/token"
        )


def edit_arms(reports: Mapping[str, EditReport]) -> pd.DataFrame:
    """EM of several edits of one model side by side, for `memcircuits.display.figures.bars.arms`.

    Args:
        reports: name of the arm -> its report. An arm named `before` shows its report's numbers
            before the edit, all others those after it.

    Returns:
        Columns `arm, set, value, value_low, value_high` (tokens, 95 % over paragraphs), for the
        targets, the targets under attack where that was measured, and the controls' own
        continuations.
    """
    import pandas as pd

    sets = {
        "memorized": "memorized/em",
        "memorized, under attack": "memorized/em_attacked",
        "control": "control/em",
    }
    rows = []
    for name, measure in sets.items():
        for arm, report in reports.items():
            if measure not in report.samples:
                continue
            values = report.samples[measure][0 if arm == "before" else 1].float()
            low, high = bootstrap_interval(values).tolist()
            rows.append(
                {
                    "arm": arm,
                    "set": name,
                    "value": float(values.mean()),
                    "value_low": low,
                    "value_high": high,
                }
            )
    return pd.DataFrame(rows)


def evaluate_edit(
    model: Any,
    edit: Edit,
    memorized: Any,
    control: Any,
    *,
    others: Any = None,
    heldout: Any = None,
    attacks: int = 20,
    n_samples: int = 1000,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> EditReport:
    """Measure an edit before and after, see the module's text.

    Args:
        model: the model that the edit was made for.
        edit: the edit.
        memorized: its targets.
        control: paragraphs that it was not given.
        others: further memorized paragraphs, which are to stay; None: not measured.
        heldout: text whose perplexity is measured, all tokens but the first; None: not measured.
        attacks: random perturbations of each target's prefix, each replacing one to three tokens;
            `em_attacked` is the largest EM among them and the prefix itself. 0: not measured.
        n_samples: samples that `extraction` allows an attacker (Hayes et al. 2024).
        seed: of the perturbations.
        memory_budget: bytes that one batch may take.
        progress: show bars on stderr.

    Raises:
        InputError: for unusable paragraphs, or another model than the edit's.
    """
    adapter = adapt(model)
    at_least("attacks", attacks, 0)
    at_least("n_samples", n_samples, 1)
    options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    memorized = Paragraphs.of(memorized, model, "memorized")
    control = Paragraphs.of(control, model, "control")
    further = None if others is None else Paragraphs.of(others, model, "others")
    text = None if heldout is None else Paragraphs.of(heldout, model, "heldout")
    own = greedy_continuations(model, control, **options)
    attacked = random_prefixes(memorized, adapter.d_vocab, attacks, seed) if attacks else None

    def measure() -> dict[str, Tensor]:
        targets = scan(model, memorized, **options)
        kept = scan(model, own, **options)
        found = {
            "memorized/em": targets.em,
            "memorized/nll": targets.nll,
            "memorized/bits": targets.bits,
            "memorized/loose_match": targets.loose_match,
            "memorized/extraction": extraction_probability(targets.log_prob, n_samples),
            "control/em": kept.em,
            "control/nll": scan(model, control, **options).nll,
        }
        if attacked is not None:
            em = scan(model, attacked, **options).em.view(len(memorized), attacks)
            found["memorized/em_attacked"] = torch.maximum(em.amax(-1), targets.em)
        if further is not None:
            recited = scan(model, further, **options)
            found["others/em"], found["others/in_full"] = recited.em, recited.is_memorized
        if text is not None:
            found["heldout/perplexity"] = _all_tokens(adapter, text, memory_budget)
        return found

    before = measure()
    with edit.apply(model):
        after = measure()
    kl = edit_divergence(model, edit, own, memory_budget=memory_budget)
    before["control/kl"], after["control/kl"] = torch.zeros_like(kl), kl
    return EditReport(
        samples={name: torch.stack([before[name].float(), after[name].float()]) for name in before},
        n_samples=n_samples,
        provenance=Provenance.of(
            adapter,
            {"memorized": memorized, "control": control, "others": further, "heldout": text},
            edit=dict(edit.provenance.options),
            attacks=attacks,
            n_samples=n_samples,
            seed=seed,
        ),
    )


def compare_edits(
    model: Any, edits: Mapping[str, Edit], memorized: Any, control: Any, **options: Any
) -> pd.DataFrame:
    """Edits side by side, and no edit at all: one row per set and measure, one column per arm.

    The first row says how many weights each changed.

    Args:
        model: the model that the edits were made for.
        edits: name of the arm -> edit.
        memorized: what all of them were to forget.
        control: paragraphs that none was given.
        **options: see `evaluate_edit`.
    """
    import pandas as pd

    if not edits:
        raise InputError("edits", "none", "give at least one")
    columns: dict[str, pd.Series] = {}
    for name, edit in edits.items():
        frame = evaluate_edit(model, edit, memorized, control, **options).to_frame()
        frame = frame.set_index(["set", "measure", "units"])
        columns.setdefault("no-op", frame["before"])
        columns[name] = frame["after"]
    changed = {name: float(edit.n_changed) for name, edit in edits.items()}
    index = pd.MultiIndex.from_tuples([("edit", "changed", "weights")], names=frame.index.names)
    first = pd.DataFrame({"no-op": 0.0} | changed, index=index)
    return pd.concat([first, pd.DataFrame(columns)])


def extraction_probability(
    log_prob: Float[Tensor, " paragraph"], n: int
) -> Float[Tensor, " paragraph"]:
    """Probability that `n` samples contain the continuation: 1 - (1 - p)^n, p = exp(log_prob)."""
    p = log_prob.double().exp().clamp_max(1 - 1e-15)
    return -torch.expm1(n * torch.log1p(-p))


def edit_divergence(
    model: Any, edit: Edit, paragraphs: Any, *, memory_budget: int | None = None
) -> Float[Tensor, " paragraph"]:
    """KL(original || edited) along the continuations, nats/token."""
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    size = rows_that_fit(
        adapter, paragraphs.ids.shape[1], 2 * paragraphs.n_continuation, memory_budget
    )

    def one_batch(piece: slice) -> Tensor:
        original = continuation_log_probs(adapter, paragraphs, piece)
        with edit.apply(model):
            edited = continuation_log_probs(adapter, paragraphs, piece)
        return kl_divergence(original, edited).mean(-1).cpu()

    with adapter.preserving_state():
        return map_batches(len(paragraphs), size, one_batch)


def _all_tokens(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
) -> Float[Tensor, " paragraph"]:
    """Mean NLL of every token but the first, nats/token."""
    n_pos = paragraphs.ids.shape[1]

    def one_batch(piece: slice) -> Tensor:
        ids = paragraphs.ids[piece]
        run = adapter.run(ids[:, :-1])
        return read_continuation(run.logits, ids[:, 1:].to(run.logits.device)).nll.cpu()

    with adapter.preserving_state():
        return map_batches(
            len(paragraphs), rows_that_fit(adapter, n_pos, n_pos, memory_budget), one_batch
        )


def random_prefixes(paragraphs: Paragraphs, d_vocab: int, attacks: int, seed: int) -> Paragraphs:
    """Each paragraph `attacks` times, with one to three random prefix tokens replaced."""
    generator = torch.Generator().manual_seed(seed)
    ids = paragraphs.ids.repeat_interleave(attacks, 0)
    rows, n_prefix = len(ids), paragraphs.n_prefix
    order = torch.rand(rows, n_prefix, generator=generator).argsort(-1)
    count = torch.randint(1, 4, (rows, 1), generator=generator)
    tokens = torch.randint(d_vocab, (rows, n_prefix), generator=generator)
    prefix = torch.where(order < count, tokens, ids[:, :n_prefix])
    return Paragraphs(torch.cat([prefix, ids[:, n_prefix:]], 1), n_prefix)
