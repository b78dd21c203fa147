"""The objective of deep unlearning: answer like a model that never saw the text, from any entry.

    mean over entries of KL(reference || current) + token_weight * |memory|
    + kl_weight * KL(original || current) to keep

The memory of a true token is by how much its log-probability is larger than the reference's. KL
alone leaves half of it: the true token is one of thousands to it, and of little weight where the
reference does not expect it. Both signs count, so that no token becomes less likely than it is to a
model that never saw the text, which would tell that something was removed.

The entries of a target are its own prefix and, drawn anew at each step, attacked ones
(`memcircuits.editing.attacks`). The reference (`memcircuits.editing.references`) has a distribution
for every position of the continuation, so that each token is forgotten given all tokens before it,
and the target is not pushed below what such a model knows. What is to be kept are the controls, as
they are written and as the model itself continues their prefixes; give other recitations among the
controls to keep those too.

Without a budget, the steps go on to their end even if no target is recited any more: depth is their
aim. `Edit.stopped` says whether every target was below `em_below` at the end, from the entries of
the last step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.attacks import cut, prepended, replaced, spliced
from memcircuits.editing.masks import Mask
from memcircuits.editing.objective import Evaluation, Objective
from memcircuits.editing.unlearning_objective import ReferenceDistribution, history_row
from memcircuits.measure.continuation import continuation_logits, kl_divergence, read_continuation
from memcircuits.measure.gradients import rows_that_fit_backward
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches

ROWS = 6  # attacked entries of each step, at least one of each sort and target


@dataclass(frozen=True)
class DeepObjective(Objective):
    """The objective of deep unlearning.

    Attributes:
        adapter: the model.
        memorized: the targets.
        reference: the reference's log-probabilities, nats.
        fillers: texts that attacked entries take other tokens from.
        kept: texts to keep, and the unedited model's distributions on them.
        held_out: controls that nothing but the KL budget sees.
        kl_budget: nats/token on `held_out`; infinity: no limit.
        token_weight: of the memory of the true tokens, see the module's text.
        kl_weight: of the KL of the texts to keep.
        control_batch: of these texts in each step.
        em_below: a target is forgotten if fewer tokens are recited from every entry.
        generator: of all draws.
        memory_budget: maximum bytes per batch.
    """

    adapter: Adapter
    memorized: Paragraphs
    reference: Float[Tensor, "paragraph pos d_vocab"]
    fillers: Paragraphs
    kept: Sequence[ReferenceDistribution]
    held_out: ReferenceDistribution
    kl_budget: float
    token_weight: float
    kl_weight: float
    control_batch: int
    em_below: float
    generator: torch.Generator
    memory_budget: int | None

    def evaluate(self, mask: Mask, *, last: bool, gradient: bool = True) -> Evaluation:
        """Measure the targets from newly drawn entries, and the held-out KL if there is a budget.

        Without a budget the KL cannot stop the search, and is measured at its end only.
        """
        entries = self._draw_entries()
        n_rows = sum(map(len, entries))
        total = torch.zeros(len(mask), device=mask.device)
        parts = [self._measure(entry, mask, n_rows, gradient) for entry in entries]
        for part in parts:
            if part[2] is not None:
                total += part[2]
        em = torch.stack([part[1]["em"].view(-1, len(self.memorized)).amax(0) for part in parts])
        row = history_row({"forget": torch.cat([part[0] for part in parts]), **parts[0][1]})
        row |= {"em_attacked": float(em.max())}
        kl, known = math.nan, list(row.values())
        if last or (gradient and self.kl_budget < math.inf):
            kl = self.held_out.mean_kl(self.adapter, self.memory_budget)
            known.append(kl)
        reached = last and bool((em < self.em_below).all())
        return Evaluation(
            row=row | {"kl": kl},
            loss=row["forget"],
            gradient=total,
            finite=all(map(math.isfinite, known)),
            reached=reached,
            rejected=kl > self.kl_budget,
            done=reached,
        )

    def full_gradient(self, mask: Mask, evaluation: Evaluation) -> Float[Tensor, " weight"]:
        """Gradient of both terms."""
        return evaluation.gradient + self.kl_weight * self._keeping_gradient(mask)

    def prefers(self, new: Evaluation, best: Evaluation | None) -> bool:
        """Always: the last change within the budget is kept, whatever its loss."""
        return True

    def is_forgotten(self, mask: Mask, draws: int = 5) -> bool:
        """Whether fewer than `em_below` tokens are recited from any entry of several draws."""
        rows = [self.evaluate(mask, last=False, gradient=False).row for _ in range(draws)]
        return max(row["em_attacked"] for row in rows) < self.em_below

    def scores(self, mask: Mask, draws: int = 4) -> Float[Tensor, " weight"]:
        """Root of the summed squared gradients of several draws of entries."""
        squares = torch.zeros(len(mask), device=mask.device)
        for _ in range(draws):
            squares += self.evaluate(mask, last=False).gradient.square()
        return squares.sqrt()

    def _draw_entries(self) -> list[Paragraphs]:
        """Sets of entries; each has the targets in their order, once or several times."""
        repeats = max(1, ROWS // (3 * len(self.memorized)))
        targets = self.memorized[list(range(len(self.memorized))) * repeats]
        moved = (cut, prepended)[int(torch.randint(2, (1,), generator=self.generator))]
        attacked = [
            attack(targets, self.fillers, self.adapter.n_ctx, self.generator)
            for attack in (replaced, spliced, moved)
        ]
        return [self.memorized, *attacked]

    def _measure(
        self, entries: Paragraphs, mask: Mask, n_rows: int, with_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The first term of each entry, its `nll` and `em`, and the gradient of its mean."""
        parameters = mask.parameters
        losses, nll, em = [], [], []
        total = torch.zeros(len(mask), device=mask.device) if with_gradient else None

        def work(batch: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            logits = continuation_logits(self.adapter, entries, batch)
            rows = torch.arange(len(entries))[batch] % len(self.memorized)
            reference = self.reference[rows].to(logits.device)
            true = entries.continuation[batch].to(logits.device)
            loss = self._distance(reference, logits.float().log_softmax(-1), true)
            scores = read_continuation(logits, true)
            gradient = None
            if with_gradient:
                part = loss.sum() / n_rows
                gradient = mask.gather(torch.autograd.grad(part, parameters))
            return loss.detach().cpu(), scores.nll.detach().cpu(), scores.em.cpu(), gradient

        size = rows_that_fit_backward(self.adapter, entries, self.memory_budget)
        with self.adapter.preserving_state(grad=parameters if with_gradient else []):
            for _, (loss, loss_per_token, recited, gradient) in iter_batches(
                len(entries), size, work
            ):
                losses.append(loss)
                nll.append(loss_per_token)
                em.append(recited)
                if total is not None and gradient is not None:
                    total += gradient
        return torch.cat(losses), {"nll": torch.cat(nll), "em": torch.cat(em)}, total

    def _distance(
        self,
        reference: Float[Tensor, "batch pos d_vocab"],
        log_p: Float[Tensor, "batch pos d_vocab"],
        true: Int[Tensor, "batch pos"],
    ) -> Float[Tensor, " batch"]:
        """KL(reference || current) and the weighted memory, a mean over positions, nats/token."""
        memory = (log_p - reference).gather(-1, true[..., None])[..., 0]
        return (kl_divergence(reference, log_p) + self.token_weight * memory.abs()).mean(-1)

    def _keeping_gradient(self, mask: Mask) -> Float[Tensor, " weight"]:
        """Gradient of the KL of a random batch of each set of texts to keep, a mean over sets."""
        total = torch.zeros(len(mask), device=mask.device)
        for texts in self.kept:
            total += texts.kl_gradient(
                self.adapter, mask, self.control_batch, self.generator, self.memory_budget
            )
        return total / len(self.kept)
