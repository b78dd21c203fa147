"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import Mask
from memcircuits.measure.continuation import (
    Continuation,
    continuation_log_probs,
    continuation_logits,
    kl_divergence,
    read_continuation,
)
from memcircuits.measure.gradients import rows_that_fit_backward
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches, map_batches, rows_that_fit


@dataclass(frozen=True)
class Targets:
    """The paragraphs that are to change, and what is minimised on them."""

    adapter: Adapter
    memorized: Paragraphs
    new: Paragraphs | None
    kind: str
    em_below: float
    memory_budget: int | None

    def __getitem__(self, index: int) -> Targets:
        """One of them alone."""
        return replace(
            self,
            memorized=self.memorized[[index]],
            new=None if self.new is None else self.new[[index]],
        )

    @property
    def aim(self) -> Paragraphs:
        """What the objective reads."""
        return self.memorized if self.new is None else self.new

    def objective(
        self, piece: slice, logits: Float[Tensor, "batch pos d_vocab"]
    ) -> tuple[Float[Tensor, " batch"], Continuation]:
        """The loss of each paragraph, and how the model takes the continuation."""
        tokens = self.aim.continuation[piece].to(logits.device)
        found = read_continuation(logits, tokens)
        sign = 1.0 if self.new is None else -1.0
        if self.kind == "nll":
            return sign * found.log_prob.mean(-1), found
        if self.kind == "margin" or self.new is not None:
            margin = sign * _margin(logits.float(), tokens)
            return (margin + 1).clamp_min(0).mean(-1), found
        return found.log_prob.cumsum(-1).exp().sum(-1).log1p(), found

    def alone(self, piece: slice, logits: Tensor) -> list[Tensor]:
        """For `iter_paragraph_gradients`."""
        return [self.objective(piece, logits)[0]]

    def pulls(self, em: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """1 for the paragraphs that still count."""
        if self.kind != "recitation" or self.new is not None:
            return torch.ones(len(em), device=em.device)
        return (em >= self.em_below).float()

    def reached(self, found: dict[str, Tensor]) -> Bool[Tensor, " batch"]:
        """Which are forgotten, or which new continuations are recited."""
        if self.new is not None:
            return found["em_new"] == self.new.n_continuation
        return found["em"] < self.em_below

    def read(
        self, mask: Mask | None = None
    ) -> tuple[dict[str, Tensor], Float[Tensor, " weight"] | None]:
        """Measures of each at the weights as they are, and the objective's slope in a mask."""
        aim = self.aim
        parameters = [] if mask is None else mask.parameters
        total = None

        def work(piece: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            loss, found = self.objective(piece, continuation_logits(self.adapter, aim, piece))
            slope = None
            if mask is not None:
                part = (loss * self.pulls(found.em)).sum() / len(aim)
                slope = mask.gather(torch.autograd.grad(part, parameters))
            nll = found.nll.detach()
            return loss.detach().cpu(), nll.cpu(), found.em.detach().cpu(), slope

        size = rows_that_fit_backward(self.adapter, aim, self.memory_budget)
        parts: list[list[Tensor]] = [[], [], []]
        with self.adapter.preserving_state(grad=parameters):
            for _, (*measures, slope) in iter_batches(len(aim), size, work):
                for part, values in zip(parts, measures, strict=True):
                    part.append(values)
                if slope is not None:
                    total = slope if total is None else total + slope
        found = dict(zip(("forget", "nll", "em"), map(torch.cat, parts), strict=True))
        if self.new is not None:
            found["em_new"] = found["em"]
            found["em"] = scan(
                self.adapter, self.memorized, memory_budget=self.memory_budget, progress=False
            ).em.cpu()
        return found, total


def history_row(found: dict[str, Tensor]) -> dict[str, float]:
    """A row of the history, but for the KL."""
    row = {key: float(values.float().mean()) for key, values in found.items()}
    return row | {"em_max": float(found["em"].max())}


@dataclass(frozen=True)
class ReferenceDistribution:
    """Controls and the unedited model's log-probabilities of every token at their continuations."""

    paragraphs: Paragraphs
    log_p: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
    ) -> ReferenceDistribution:
        with adapter.preserving_state():
            size = rows_that_fit(
                adapter, paragraphs.ids.shape[1], paragraphs.n_continuation, memory_budget
            )
            log_p = map_batches(
                len(paragraphs),
                size,
                lambda piece: continuation_log_probs(adapter, paragraphs, piece),
            )
        return cls(paragraphs, log_p)

    def kl(self, adapter: Adapter, rows: Tensor) -> Float[Tensor, " batch"]:
        """KL(original || current) of some rows, nats/token."""
        current = continuation_log_probs(adapter, self.paragraphs, rows)
        original = self.log_p[rows.to(self.log_p.device)]
        return kl_divergence(original, current).mean(-1)

    def mean_kl(self, adapter: Adapter, memory_budget: int | None) -> float:
        """The same of all rows together."""
        held = self.paragraphs
        size = rows_that_fit(adapter, held.ids.shape[1], held.n_continuation, memory_budget)
        rows = torch.arange(len(held))
        with adapter.preserving_state():
            return float(
                map_batches(len(held), size, lambda piece: self.kl(adapter, rows[piece])).mean()
            )


def _margin(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Tensor
) -> Float[Tensor, "batch pos"]:
    """Logit of the target minus the largest other logit."""
    mine = logits.gather(-1, targets[..., None])
    others = logits.scatter(-1, targets[..., None], -torch.inf)
    return mine[..., 0] - others.amax(-1)
