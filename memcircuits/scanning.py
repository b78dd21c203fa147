"""Which paragraphs does the model recite? EM, NLL and margins by one forward pass each.

A paragraph is memorized when all continuation tokens are recited (EM = 50 in the paper) and a
control when at most a fifth of them are (EM <= 10 of 50), section 3 of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memcircuits.adapter import adapt
from memcircuits.measure import Continuation, read_continuation
from memcircuits.memory import in_pieces, rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance, Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Scan(Result, kind="scan"):
    """How the model takes each paragraph.

    Attributes:
        ids: token ids [paragraph, pos].
        n_prefix: tokens of the prefix.
        names: one per paragraph.
        facts: the paragraphs' further columns.
        token_log_prob: log p of each continuation token, nats, [paragraph, pos].
        token_correct: whether it is the greedy choice, [paragraph, pos].
        token_margin: top-2 logit margin, [paragraph, pos].
        provenance: where the numbers come from.
    """

    ids: Tensor
    n_prefix: int
    names: tuple[str, ...]
    facts: Mapping[str, tuple[Any, ...]]
    token_log_prob: Float[Tensor, "paragraph pos"]
    token_correct: Bool[Tensor, "paragraph pos"]
    token_margin: Float[Tensor, "paragraph pos"]
    provenance: Provenance

    @cached_property
    def paragraphs(self) -> Paragraphs:
        """All paragraphs scanned."""
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names), self.facts)

    @property
    def _continuation(self) -> Continuation:
        return Continuation(self.token_log_prob, self.token_correct, self.token_margin)

    @property
    def em(self) -> Tensor:
        """Tokens recited before the first mismatch, [paragraph]; 0 where not finite."""
        return self._continuation.em * self.finite

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood of the continuation, nats/token, [paragraph]."""
        return self._continuation.nll

    @property
    def log_prob(self) -> Tensor:
        """Log-probability of the whole continuation, nats, [paragraph]."""
        return self.token_log_prob.sum(-1)

    @property
    def margin(self) -> Tensor:
        """Smallest top-2 logit margin over the recited tokens and the first mismatch."""
        position = torch.arange(self.token_margin.shape[1])
        decided = position <= self.em[:, None]
        return self.token_margin.masked_fill(~decided, float("inf")).amin(-1)

    @property
    def finite(self) -> Tensor:
        """Whether all numbers of a paragraph are finite; others are never ranked."""
        return self.token_log_prob.isfinite().all(-1) & self.token_margin.isfinite().all(-1)

    @property
    def is_memorized(self) -> Tensor:
        """EM equals the length of the continuation, [paragraph]."""
        return self.em == self.token_correct.shape[1]

    @property
    def is_control(self) -> Tensor:
        """EM at most a fifth of the continuation (10 of 50), [paragraph]."""
        return (self.em * 5 <= self.token_correct.shape[1]) & self.finite

    @property
    def memorized(self) -> Paragraphs | None:
        """The memorized paragraphs, None if there is none."""
        return self.paragraphs[self.is_memorized] if self.is_memorized.any() else None

    @property
    def control(self) -> Paragraphs | None:
        """The paragraphs hardly recited, None if there is none."""
        return self.paragraphs[self.is_control] if self.is_control.any() else None

    def to_frame(self) -> pd.DataFrame:
        """Columns `id, em, nll, log_prob, margin, memorized, finite` and the facts."""
        import pandas as pd

        return pd.DataFrame(
            {
                "id": self.names,
                "em": self.em.numpy(),
                "nll": self.nll.double().numpy(),
                "log_prob": self.log_prob.double().numpy(),
                "margin": self.margin.double().numpy(),
                "memorized": self.is_memorized.numpy(),
                "finite": self.finite.numpy(),
                **{key: list(values) for key, values in self.facts.items()},
            }
        )

    def by_repetitions(self) -> pd.DataFrame:
        """The duplication curve (figure 2): EM and NLL against times seen in training.

        Columns `repetitions, n, em, em_se, nll, nll_se, memorized`.

        Raises:
            InputError: if the paragraphs do not say how often they were seen.
        """
        from memcircuits.checks import InputError

        if "repetitions" not in self.facts:
            raise InputError(
                "paragraphs", "no column `repetitions`", "the duplication curve needs counts"
            )
        groups = self.to_frame().groupby("repetitions")
        return groups.agg(
            n=("em", "size"),
            em=("em", "mean"),
            em_se=("em", "sem"),
            nll=("nll", "mean"),
            nll_se=("nll", "sem"),
            memorized=("memorized", "sum"),
        ).reset_index()

    def figure(self) -> Any:
        """The duplication curve where counts are known, else EM against NLL (plotly)."""
        from memcircuits import figures

        if "repetitions" in self.facts:
            frame = self.by_repetitions()
            return figures.duplication_curve(frame[frame["repetitions"] > 0])
        return figures.em_against_nll(self.to_frame())

    def __str__(self) -> str:
        return (
            f"{len(self.names)} paragraphs, {int(self.is_memorized.sum())} memorized, "
            f"{int(self.is_control.sum())} controls"
        )


def scan(
    model: Any,
    paragraphs: Any,
    *,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Scan:
    """Measure how much of each paragraph the model recites.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        batch_size: paragraphs per forward pass; by default as many as fit.
        memory_budget: bytes that one forward pass may take.
        progress: show a bar on stderr.

    Returns:
        A `Scan`; paragraphs with non-finite numbers are marked in `Scan.finite`.

    Raises:
        InputError: for paragraphs that the model cannot take.
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    targets = paragraphs.continuation.to(adapter.device)
    size = batch_size or rows_that_fit(
        adapter, paragraphs.ids.shape[1], paragraphs.n_continuation, memory_budget
    )

    def one_batch(piece: slice) -> Tensor:
        run = adapter.run(
            paragraphs.ids[piece, :-1], positions=slice(paragraphs.n_prefix - 1, None)
        )
        found = read_continuation(run.logits, targets[piece], margin=True)
        assert found.margin is not None
        return torch.stack([found.log_prob, found.correct.float(), found.margin], 1).cpu()

    with adapter.untouched(), bar(len(paragraphs), "scan", progress=progress) as shown:
        found = in_pieces(len(paragraphs), size, one_batch, shown.update)
    return Scan(
        ids=paragraphs.ids,
        n_prefix=paragraphs.n_prefix,
        names=paragraphs.names,
        facts=paragraphs.facts,
        token_log_prob=found[:, 0].contiguous(),
        token_correct=found[:, 1] > 0.5,
        token_margin=found[:, 2].contiguous(),
        provenance=Provenance.of(adapter, {"paragraphs": paragraphs}),
    )
