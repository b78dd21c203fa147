"""The objective of `unlearn` and `edit`: arXiv 2403.19851, equation 3.

    forgetting term on the targets  +  kl_weight * KL(original || current) on the controls

Both terms are means per continuation token given the true tokens before it, in nats. `Targets` has
the first term: for `unlearn` it lowers the probability of the memorized continuation, for `edit` it
raises that of the new one. `ReferenceDistribution` has the second: the unedited model's
probabilities of every token. Natural-gradient steps take the second term from the quadratic model
of `memcircuits.editing.curvature` instead. (At the unedited model the KL is at its minimum and has
no gradient, so it cannot influence a mask that is chosen there.)

The edit mostly blocks the first tokens of a continuation: a model that takes another first token no
longer recites, though it may still know the rest. `NATURAL_GRADIENT` with `objective="margin"` and
`em_below=0` spends the whole KL budget on making every token of the continuation non-greedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import Mask
from memcircuits.editing.objective import Evaluation, Objective
from memcircuits.editing.recipe import ForgettingTerm
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

_NPO_BETA = 0.1  # as its authors


@dataclass(frozen=True)
class Targets:
    """The paragraphs that are to change, and the loss on them.

    Attributes:
        adapter: the model.
        memorized: the paragraphs to forget.
        new: for `edit`, the same prefixes with the new continuations.
        objective: the forgetting term, see `Recipe`.
        em_below: a paragraph is forgotten if fewer tokens are recited.
        memory_budget: maximum bytes per batch.
        unedited: for `npo`, log-probability of each continuation of the unedited model, nats.
    """

    adapter: Adapter
    memorized: Paragraphs
    new: Paragraphs | None
    objective: ForgettingTerm
    em_below: float
    memory_budget: int | None
    unedited: Float[Tensor, " paragraph"] | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        memorized: Paragraphs,
        new: Paragraphs | None,
        objective: ForgettingTerm,
        em_below: float,
        memory_budget: int | None,
    ) -> Targets:
        """Targets of the model as it is now."""
        unedited = None
        if objective == "npo":
            paragraphs = memorized if new is None else new
            unedited = scan(
                adapter, paragraphs, memory_budget=memory_budget, progress=False
            ).log_prob
        return cls(adapter, memorized, new, objective, em_below, memory_budget, unedited)

    def __getitem__(self, index: int) -> Targets:
        """A single target."""
        new = None if self.new is None else self.new[[index]]
        unedited = None if self.unedited is None else self.unedited[[index]]
        return replace(self, memorized=self.memorized[[index]], new=new, unedited=unedited)

    def __len__(self) -> int:
        return len(self.memorized)

    @property
    def optimized(self) -> Paragraphs:
        """The paragraphs whose continuation the loss reads."""
        return self.memorized if self.new is None else self.new

    def losses(
        self, batch: slice, logits: Float[Tensor, "batch pos d_vocab"]
    ) -> tuple[Float[Tensor, " batch"], Continuation]:
        """The loss of each paragraph, and the scores of its continuation."""
        tokens = self.optimized.continuation[batch].to(logits.device)
        scores = read_continuation(logits, tokens)
        sign = 1.0 if self.new is None else -1.0
        if self.objective == "nll":
            return sign * scores.log_prob.mean(-1), scores
        if self.unedited is not None:
            log_ratio = scores.log_prob.sum(-1) - self.unedited[batch].to(logits.device)
            loss = 2 / _NPO_BETA * softplus(sign * _NPO_BETA * log_ratio)
            return loss / tokens.shape[-1], scores
        if self.objective == "margin" or self.new is not None:
            margin = sign * _margin(logits.float(), tokens)
            return (margin + 1).clamp_min(0).mean(-1), scores
        return scores.log_prob.cumsum(-1).exp().sum(-1).log1p(), scores

    def row_losses(self, batch: slice, logits: Tensor) -> list[Float[Tensor, " batch"]]:
        """The loss of each paragraph, for `iter_paragraph_gradients`."""
        return [self.losses(batch, logits)[0]]

    def active_weight(self, em: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Weight of each paragraph in the loss: 0 for one that is forgotten already."""
        if self.objective != "recitation" or self.new is not None:
            return torch.ones(len(em), device=em.device)
        return (em >= self.em_below).float()

    def reached(self, measures: Mapping[str, Tensor]) -> Bool[Tensor, " batch"]:
        """Which paragraphs are forgotten, or for `edit` which new continuations are recited."""
        if self.new is not None:
            return measures["em_new"] == self.new.n_continuation
        return measures["em"] < self.em_below

    def evaluate(
        self, mask: Mask | None = None
    ) -> tuple[dict[str, Tensor], Float[Tensor, " weight"] | None]:
        """Measures of each target at the weights as they are, and the loss's gradient in a mask.

        Returns:
            `forget` (the loss), `nll` (nats/token), `em` and for `edit` `em_new` (tokens), each
            [target]; the gradient, None without a mask.
        """
        paragraphs = self.optimized
        parameters = [] if mask is None else mask.parameters
        total = None

        def work(batch: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            logits = continuation_logits(self.adapter, paragraphs, batch)
            loss, scores = self.losses(batch, logits)
            gradient = None
            if mask is not None:
                part = (loss * self.active_weight(scores.em)).sum() / len(paragraphs)
                gradient = mask.gather(torch.autograd.grad(part, parameters))
            return loss.detach().cpu(), scores.nll.detach().cpu(), scores.em.cpu(), gradient

        size = rows_that_fit_backward(self.adapter, paragraphs, self.memory_budget)
        parts: dict[str, list[Tensor]] = {"forget": [], "nll": [], "em": []}
        with self.adapter.preserving_state(grad=parameters):
            for _, (*values, gradient) in iter_batches(len(paragraphs), size, work):
                for batches, value in zip(parts.values(), values, strict=True):
                    batches.append(value)
                if gradient is not None:
                    total = gradient if total is None else total + gradient
        measures = {name: torch.cat(batches) for name, batches in parts.items()}
        if self.new is not None:
            measures["em_new"] = measures["em"]
            measures["em"] = scan(
                self.adapter, self.memorized, memory_budget=self.memory_budget, progress=False
            ).em.cpu()
        return measures, total


def history_row(measures: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the targets, and the largest EM: a row of the history without the KL."""
    row = {name: float(values.float().mean()) for name, values in measures.items()}
    return row | {"em_max": float(measures["em"].max())}


def _margin(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Logit of the token minus the largest other logit."""
    own = logits.gather(-1, tokens[..., None])
    others = logits.scatter(-1, tokens[..., None], -torch.inf)
    return own[..., 0] - others.amax(-1)


@dataclass(frozen=True)
class ReferenceDistribution:
    """Controls and the unedited model's log-probabilities of every token at their continuations."""

    paragraphs: Paragraphs
    log_p: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
    ) -> ReferenceDistribution:
        """Read the distribution of the model as it is now."""
        size = rows_that_fit(
            adapter, paragraphs.inputs.shape[1], paragraphs.n_continuation, memory_budget
        )

        with adapter.preserving_state():
            log_p = map_batches(
                len(paragraphs),
                size,
                lambda batch: continuation_log_probs(adapter, paragraphs, batch),
            )
        return cls(paragraphs, log_p)

    def kl(self, adapter: Adapter, rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """KL(original || current) of some of the controls, nats/token."""
        current = continuation_log_probs(adapter, self.paragraphs, rows)
        original = self.log_p[rows.to(self.log_p.device)]
        return kl_divergence(original, current).mean(-1)

    def mean_kl(self, adapter: Adapter, memory_budget: int | None) -> float:
        """Mean of `kl` over all controls."""
        n_pos, n_logits = self.paragraphs.inputs.shape[1], self.paragraphs.n_continuation
        size = rows_that_fit(adapter, n_pos, n_logits, memory_budget)
        rows = torch.arange(len(self.paragraphs))
        with adapter.preserving_state():
            kl = map_batches(len(rows), size, lambda batch: self.kl(adapter, rows[batch]))
        return float(kl.mean())

    def kl_gradient(
        self,
        adapter: Adapter,
        mask: Mask,
        n: int,
        generator: torch.Generator,
        memory_budget: int | None,
    ) -> Float[Tensor, " weight"]:
        """Gradient of the mean KL of `n` controls that are drawn anew."""
        drawn = torch.randperm(len(self.paragraphs), generator=generator)[:n]
        total = torch.zeros(len(mask), device=mask.device)

        def work(batch: slice) -> Tensor:
            part = self.kl(adapter, drawn[batch]).sum() / len(drawn)
            return mask.gather(torch.autograd.grad(part, mask.parameters))

        size = rows_that_fit_backward(adapter, self.paragraphs, memory_budget)
        with adapter.preserving_state(grad=mask.parameters):
            for _, gradient in iter_batches(len(drawn), size, work):
                total += gradient
        return total


@dataclass(frozen=True)
class EditObjective(Objective):
    """The objective of `unlearn` and `edit`.

    Attributes:
        targets: the paragraphs that are to change.
        held_out: controls that nothing but the KL budget sees.
        kl_budget: nats/token on `held_out`; infinity: no limit.
        seen: controls of the KL term; None leaves the term out.
        kl_weight: of the KL term.
        control_batch: controls that are drawn for each gradient of the KL term.
        generator: of these draws.
    """

    targets: Targets
    held_out: ReferenceDistribution
    kl_budget: float
    seen: ReferenceDistribution | None
    kl_weight: float
    control_batch: int
    generator: torch.Generator

    def evaluate(self, mask: Mask, *, last: bool, gradient: bool = True) -> Evaluation:
        """Measure the targets, and the held-out KL where the search needs it.

        Without a budget the KL cannot stop the search, and is measured at its end only.
        """
        measures, loss_gradient = self.targets.evaluate(mask if gradient else None)
        row = history_row(measures)
        reached = bool(self.targets.reached(measures).all())
        limited = self.kl_budget < math.inf
        kl = math.nan
        if gradient and (limited or last or reached):
            kl = self.held_out_kl()
        known = [*row.values(), kl] if limited else list(row.values())
        if loss_gradient is None:
            loss_gradient = torch.zeros(len(mask), device=mask.device)
        return Evaluation(
            row=row | {"kl": kl},
            loss=row["forget"],
            gradient=loss_gradient,
            finite=all(map(math.isfinite, known)),
            reached=reached,
            rejected=kl > self.kl_budget,
            done=reached or not bool(loss_gradient.any()),
        )

    def held_out_kl(self) -> float:
        """KL on the held-out controls at the weights as they are, nats/token."""
        return self.held_out.mean_kl(self.targets.adapter, self.targets.memory_budget)

    def full_gradient(self, mask: Mask, evaluation: Evaluation) -> Float[Tensor, " weight"]:
        """Gradient of the loss, and of the KL term where there is one."""
        if self.seen is None:
            return evaluation.gradient
        kl = self.seen.kl_gradient(
            self.targets.adapter,
            mask,
            self.control_batch,
            self.generator,
            self.targets.memory_budget,
        )
        return evaluation.gradient + self.kl_weight * kl

    def prefers(self, new: Evaluation, best: Evaluation | None) -> bool:
        """Always: the last change within the budget is kept, whatever its loss."""
        return True
