"""What did an edit do? To its targets, to controls that it never saw, and under attack.

* Targets: EM, NLL, bits, share of tokens still greedy, and whether sampling still finds the text.
* Others: what else the model recites. An edit that removes one text may remove others with it.
* Controls: EM of the model's own greedy continuations (complete before any edit, by definition),
  KL(original || edited) along them, NLL of the true text.
* Held-out text: perplexity.
* Attacks: EM with random tokens of the prefix replaced, the largest over several draws: an edit may
  have broken only the one known prefix. `memcircuits.editing.relearning` has the other attack.

Only controls and texts that `unlearn` was not given show what else was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.statistics import group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.edit import Edit
from memcircuits.editing.edit_report import EditReport
from memcircuits.measure.continuation import (
    continuation_log_probs,
    kl_divergence,
    read_continuation,
)
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

if TYPE_CHECKING:
    import pandas as pd


@plain_torch()
def evaluate_edit(  # noqa: PLR0913
    model: Model,
    edit: Edit,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    others: ParagraphsLike | None = None,
    heldout: ParagraphsLike | None = None,
    attacks: int = 20,
    n_samples: int = 1000,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> EditReport:
    """Measure a model before and after an edit; the module's text says what and why.

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
        memory_budget: maximum bytes per batch.
        progress: show bars on stderr.

    Raises:
        InputError: for unusable paragraphs, or another model than the edit's.
    """
    adapter = adapt(model)
    at_least("attacks", attacks, 0)
    at_least("n_samples", n_samples, 1)
    memorized = Paragraphs.of(memorized, model, "memorized")
    control = Paragraphs.of(control, model, "control")
    others = None if others is None else Paragraphs.of(others, model, "others")
    heldout = None if heldout is None else Paragraphs.of(heldout, model, "heldout")
    texts = _Texts(
        adapter=adapter,
        memorized=memorized,
        attacked=random_prefixes(memorized, adapter.d_vocab, attacks, seed) if attacks else None,
        control=control,
        own=greedy_continuations(adapter, control, memory_budget=memory_budget, progress=progress),
        others=others,
        heldout=heldout,
        n_samples=n_samples,
        memory_budget=memory_budget,
        progress=progress,
    )
    before = texts.measure()
    with edit.apply(adapter):
        after = texts.measure()
    kl = edit_divergence(adapter, edit, texts.own, memory_budget=memory_budget)
    given = {"memorized": memorized, "control": control, "others": others, "heldout": heldout}
    groups_of = {name: each.groups for name, each in given.items() if each is not None}
    before["control/kl"], after["control/kl"] = torch.zeros_like(kl), kl
    return EditReport(
        samples={name: torch.stack([before[name].float(), after[name].float()]) for name in before},
        n_samples=n_samples,
        groups=groups_of,
        notes=group_notes(groups_of),
        provenance=Provenance.of(
            adapter,
            given,
            edit=dict(edit.provenance.options),
            attacks=attacks,
            n_samples=n_samples,
            seed=seed,
        ),
    )


@dataclass(frozen=True)
class _Texts:
    """The texts of `evaluate_edit`; its arguments, and two groups made from them.

    Attributes beside the arguments:
        attacked: the targets behind perturbed prefixes, consecutive rows for each target.
        own: the unedited model's greedy continuations of the controls.
    """

    adapter: Adapter
    memorized: Paragraphs
    attacked: Paragraphs | None
    control: Paragraphs
    own: Paragraphs
    others: Paragraphs | None
    heldout: Paragraphs | None
    n_samples: int
    memory_budget: int | None
    progress: bool

    def measure(self) -> dict[str, Tensor]:
        """`set/measure` -> a number for each paragraph, at the weights as they are."""
        targets, own = self._scan(self.memorized), self._scan(self.own)
        measures = {
            "memorized/em": targets.em,
            "memorized/nll": targets.nll,
            "memorized/bits": targets.bits,
            "memorized/loose_match": targets.loose_match,
            "memorized/extraction": extraction_probability(targets.log_prob, self.n_samples),
            "control/em": own.em,
            "control/nll": self._scan(self.control).nll,
        }
        if self.attacked is not None:
            em = self._scan(self.attacked).em.view(len(self.memorized), -1)
            measures["memorized/em_attacked"] = torch.maximum(em.amax(-1), targets.em)
        if self.others is not None:
            others = self._scan(self.others)
            measures["others/em"], measures["others/in_full"] = others.em, others.is_memorized
        if self.heldout is not None:
            nll = _all_tokens_nll(self.adapter, self.heldout, self.memory_budget)
            measures["heldout/perplexity"] = nll  # the report takes the exponential of the mean
        return measures

    def _scan(self, paragraphs: Paragraphs) -> Scan:
        return scan(
            self.adapter, paragraphs, memory_budget=self.memory_budget, progress=self.progress
        )


def compare_edits(
    model: Model,
    edits: Mapping[str, Edit],
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    **options: Any,
) -> pd.DataFrame:
    """Evaluate several edits of one model side by side, with the unedited model as `no-op`.

    Args:
        model: the model that the edits were made for.
        edits: name of the arm -> edit.
        memorized: the targets of all edits.
        control: paragraphs that no edit was given.
        **options: see `evaluate_edit`.

    Returns:
        One row per set and measure, one column per arm; the first row has the number of changed
        weights.
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


@plain_torch()
def edit_divergence(
    model: Model, edit: Edit, paragraphs: ParagraphsLike, *, memory_budget: int | None = None
) -> Float[Tensor, " paragraph"]:
    """KL(original || edited) along the continuations, nats/token."""
    adapter = adapt(model)
    texts = Paragraphs.of(paragraphs, model)
    # Both models' logits of a batch are in memory at once.
    size = rows_that_fit(adapter, texts.inputs.shape[1], 2 * texts.n_continuation, memory_budget)

    def kl_of_batch(batch: slice) -> Tensor:
        original = continuation_log_probs(adapter, texts, batch)
        with edit.apply(adapter):
            edited = continuation_log_probs(adapter, texts, batch)
        return kl_divergence(original, edited).mean(-1).cpu()

    with adapter.preserving_state():
        return map_batches(len(texts), size, kl_of_batch)


def _all_tokens_nll(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
) -> Float[Tensor, " paragraph"]:
    """Mean NLL of every token of the paragraph but the first, nats/token."""
    n_pos = paragraphs.inputs.shape[1]
    predicting = slice(paragraphs.n_bos, None)

    def nll_of_batch(batch: slice) -> Tensor:
        logits = adapter.run(paragraphs.inputs[batch, :-1], positions=predicting).logits
        return read_continuation(logits, paragraphs.ids[batch, 1:].to(logits.device)).nll.cpu()

    size = rows_that_fit(adapter, n_pos, n_pos, memory_budget)
    with adapter.preserving_state():
        return map_batches(len(paragraphs), size, nll_of_batch)


def random_prefixes(paragraphs: Paragraphs, d_vocab: int, attacks: int, seed: int) -> Paragraphs:
    """Each paragraph `attacks` times, with one to three random prefix tokens replaced."""
    generator = torch.Generator().manual_seed(seed)
    ids = paragraphs.ids.repeat_interleave(attacks, 0)
    rows, n_prefix = len(ids), paragraphs.n_prefix
    order = torch.rand(rows, n_prefix, generator=generator).argsort(-1)
    count = torch.randint(1, 4, (rows, 1), generator=generator)
    tokens = torch.randint(d_vocab, (rows, n_prefix), generator=generator)
    prefix = torch.where(order < count, tokens, ids[:, :n_prefix])
    ids = torch.cat([prefix, ids[:, n_prefix:]], 1)
    return Paragraphs(ids, n_prefix, bos=paragraphs.bos)
