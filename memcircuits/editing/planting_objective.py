"""The objective of `plant`: paragraphs are to be recited, and texts not to change.

    NLL of the continuations  +  kl_weight * KL(original || current) on the anchors

Both terms are in nats/token. The first is over all paragraphs, the second over a few anchors that
are drawn anew for every step.

Only the blocks from the lowest masked layer upwards are run: the residual stream that enters that
block does not depend on the masked weights, so it is read once. (Head interventions use the same
fact, `memcircuits.evidence.interventions`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.groups import GROUP_COLUMN
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import Mask
from memcircuits.editing.objective import Evaluation, Objective
from memcircuits.measure.continuation import (
    continuation_logits,
    kl_divergence,
    read_continuation,
    run_to_continuation,
)
from memcircuits.measure.gradients import rows_that_fit_backward
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches, map_batches
from memcircuits.models.hooks import hook_name

ANCHORS_PER_STEP = 3


@dataclass(frozen=True)
class PartialForward:
    """Paragraphs whose forward pass continues from the lowest masked block.

    Attributes:
        adapter: the model.
        paragraphs: the paragraphs.
        low: the lowest masked layer.
        inputs: the residual stream that enters block `low`, [paragraph, pos, d_model]; token ids
            where the model does not support partial forward passes.
        log_p: log-probabilities of the unedited model at the continuations.
    """

    adapter: Adapter
    paragraphs: Paragraphs
    low: int
    inputs: Tensor
    log_p: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Paragraphs, low: int, memory_budget: int | None
    ) -> PartialForward:
        """Run the unedited model once."""
        name = hook_name("resid_pre", low)
        read = [name] if adapter.supports_partial_forward else []

        def run(batch: slice) -> tuple[Tensor, Tensor]:
            result = run_to_continuation(adapter, paragraphs, batch, read=read)
            inputs = result.cache.get(name, paragraphs.inputs[batch, :-1])
            return inputs, result.logits.float().log_softmax(-1)

        size = rows_that_fit_backward(adapter, paragraphs, memory_budget)
        with adapter.preserving_state():
            parts = [part for _, part in iter_batches(len(paragraphs), size, run)]
        inputs, log_p = (torch.cat(batches) for batches in zip(*parts, strict=True))
        return cls(adapter, paragraphs, low, inputs, log_p)

    def __len__(self) -> int:
        return len(self.paragraphs)

    def logits(self, rows: Tensor | slice) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits at the continuations of some paragraphs, with the weights as they are."""
        if not self.adapter.supports_partial_forward:
            return continuation_logits(self.adapter, self.paragraphs, rows)
        positions = slice(self.paragraphs.n_given - 1, None)
        resid = self.adapter.run_blocks(self.low, self.inputs[rows])
        return self.adapter.unembed(resid[:, positions])

    def kl(self, rows: Tensor | slice) -> Float[Tensor, " batch"]:
        """KL(original || current) of some paragraphs, nats/token."""
        current = self.logits(rows).float().log_softmax(-1)
        return kl_divergence(self.log_p[rows], current).mean(-1)


@dataclass(frozen=True)
class WritingObjective(Objective):
    """The objective of `plant`.

    A change is acceptable if every paragraph is recited in full. The KL on held-out anchors never
    rejects a change (Adam's steps go on from it), but the search ends once it is within the budget.

    Attributes:
        paragraphs: what is to be recited.
        anchors: texts of the KL term.
        held_out: anchors that only the KL budget sees.
        kl_weight: of the KL term; 0 leaves it out.
        kl_budget: KL on `held_out` at which the search ends, nats/token.
        generator: of the anchors' draws.
        memory_budget: maximum bytes per batch.
        owners: for each masked weight the number of the only paragraph that it learns; None: every
            weight learns all of them.
    """

    paragraphs: PartialForward
    anchors: PartialForward
    held_out: PartialForward
    kl_weight: float
    kl_budget: float
    generator: torch.Generator
    memory_budget: int | None
    owners: Int[Tensor, " weight"] | None = None

    def evaluate(self, mask: Mask, *, last: bool, gradient: bool = True) -> Evaluation:
        """Measure the paragraphs, a draw of the anchors, and the held-out KL if all is recited."""
        total = torch.zeros(len(mask), device=mask.device)
        with self.paragraphs.adapter.preserving_state(grad=mask.parameters):
            em, nll = self._add_nll(mask, total)
            kl_seen = self._add_kl(mask, total)
        reached = float(em.min()) == self.paragraphs.paragraphs.n_continuation
        kl = self._held_out_kl() if reached else math.nan
        return Evaluation(
            row={"em": float(em.mean()), "em_min": float(em.min()), "nll": nll, "kl": kl},
            loss=nll + self.kl_weight * kl_seen,
            gradient=total,
            finite=math.isfinite(nll) and math.isfinite(kl_seen),
            reached=reached,
            rejected=False,
            done=kl <= self.kl_budget,
        )

    def prefers(self, new: Evaluation, best: Evaluation | None) -> bool:
        """Of the changes with which everything is recited, the one with the lowest held-out KL."""
        return new.reached and (best is None or new.row["kl"] < best.row["kl"])

    def _add_nll(self, mask: Mask, total: Tensor) -> tuple[Float[Tensor, " paragraph"], float]:
        """Add the gradient of the mean NLL to `total`; return the EM and the NLL."""
        targets = self.paragraphs.paragraphs

        def work(batch: slice) -> tuple[Tensor, Tensor, float]:
            logits = self.paragraphs.logits(batch)
            scores = read_continuation(logits, targets.continuation[batch].to(logits.device))
            part = scores.nll.sum() / len(targets)
            gradient = mask.gather(torch.autograd.grad(part, mask.parameters))
            if self.owners is not None:
                gradient = gradient * (self.owners == batch.start).to(gradient.device)
            return gradient, scores.em.cpu(), float(part.detach())

        em, nll = [], 0.0
        size = self._batch_size if self.owners is None else 1
        for _, (gradient, batch_em, part) in iter_batches(len(targets), size, work):
            total += gradient
            em.append(batch_em)
            nll += part
        return torch.cat(em).float(), nll

    def _add_kl(self, mask: Mask, total: Tensor) -> float:
        """Add the weighted gradient of the KL of a few anchors to `total`; return the KL."""
        if not self.kl_weight:
            return 0.0
        drawn = torch.randperm(len(self.anchors), generator=self.generator)[:ANCHORS_PER_STEP]

        def work(batch: slice) -> tuple[Tensor, float]:
            part = self.anchors.kl(drawn[batch]).sum() / len(drawn)
            gradient = mask.gather(torch.autograd.grad(part, mask.parameters))
            return gradient, float(part.detach())

        kl = 0.0
        for _, (gradient, part) in iter_batches(len(drawn), self._batch_size, work):
            total += self.kl_weight * gradient
            kl += part
        return kl

    @property
    def _batch_size(self) -> int:
        targets = self.paragraphs
        return rows_that_fit_backward(targets.adapter, targets.paragraphs, self.memory_budget)

    def _held_out_kl(self) -> float:
        held_out = self.held_out
        size = rows_that_fit_backward(held_out.adapter, held_out.paragraphs, self.memory_budget)
        with held_out.adapter.preserving_state():
            return float(map_batches(len(held_out), size, held_out.kl).mean())


def sampled_text(
    adapter: Adapter, like: Paragraphs, generator: torch.Generator, n: int = 10
) -> Paragraphs:
    """Text that the model writes itself: `n` samples, token by token, each from one random token.

    Args:
        adapter: the model.
        like: paragraphs whose lengths, and tokens in front, the text has.
        generator: of the samples.
        n: number of texts.

    Raises:
        InputError: if the model's logits are not finite.
    """
    length = like.inputs.shape[1]
    front = torch.tensor(like.bos, dtype=torch.long).expand(n, -1)
    ids = torch.cat([front, torch.randint(adapter.d_vocab, (n, 1), generator=generator)], 1)
    with adapter.preserving_state():
        while ids.shape[1] < length:
            logits = adapter.run(ids, positions=slice(-1, None)).logits[:, 0].float().cpu()
            if not logits.isfinite().all():
                raise InputError(
                    "control",
                    "not given, and text that the model writes itself has non-finite logits",
                    "give some, or load the model in float32",
                )
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, token], 1)
    # Samples are independent, also where the model writes the same text twice.
    groups = {GROUP_COLUMN: tuple(range(n))}
    return Paragraphs(ids[:, like.n_bos :], like.n_prefix, metadata=groups, bos=like.bos)
