"""What one model knows of the targets: from their own prefix, behind others, and after rounding.

* From the own prefix: EM, log-probabilities, the share of tokens that are still the greedy choice,
  and the longest recited run. The run may begin at any token of the continuation: whoever knows the
  first words can start there.
* Behind other prefixes (`memcircuits.editing.attacks`): the largest EM of each sort of attack.
* After rounding to 8 and 4 bits: the largest EM of the own prefix and all attacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.attacks import ATTACKS
from memcircuits.editing.audits.rounding import rounded
from memcircuits.measure.continuation import (
    Continuation,
    continuation_log_probs,
    kl_divergence,
    score_paragraphs,
)
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit

BITS = (8, 4)


@dataclass(frozen=True)
class TargetTexts:
    """The targets, and the same continuations behind attacked prefixes.

    Attributes:
        targets: the paragraphs that an edit removed.
        attacked: sort of attack -> draws, each with the targets in their order.
        reference: log-probabilities (nats) of the model that never saw the targets.
        unedited: those of the unedited model.
        memory_budget: maximum bytes per batch.
    """

    targets: Paragraphs
    attacked: Mapping[str, Sequence[Paragraphs]]
    reference: Float[Tensor, "paragraph pos d_vocab"]
    unedited: Float[Tensor, "paragraph pos d_vocab"]
    memory_budget: int | None

    def measure(self, adapter: Adapter) -> tuple[dict[str, Tensor], Float[Tensor, "paragraph pos"]]:
        """Measures of a model as it is: name -> [paragraph]; and log p of each token, nats."""
        scores = self._score(adapter, self.targets)
        measures = own_prefix_measures(scores)
        measures["kl"] = self._kl(adapter, self.reference)
        measures["kl_unedited"] = self._kl(adapter, self.unedited)
        by_attack = self._attacked_em(adapter)
        measures |= {f"em_{name}": em for name, em in by_attack.items()}
        measures["em_attacked"] = _largest([scores.em, *by_attack.values()])
        for bits in BITS:
            with rounded(adapter, bits):
                em = self._score(adapter, self.targets).em
                measures[f"em_int{bits}"] = _largest([em, *self._attacked_em(adapter).values()])
        return {name: values.float() for name, values in measures.items()}, scores.log_prob

    def _attacked_em(self, adapter: Adapter) -> dict[str, Int[Tensor, " paragraph"]]:
        return {
            name: _largest([self._score(adapter, each).em for each in draws])
            for name, draws in self.attacked.items()
        }

    def _score(self, adapter: Adapter, paragraphs: Paragraphs) -> Continuation:
        return score_paragraphs(adapter, paragraphs, memory_budget=self.memory_budget)

    def _kl(
        self, adapter: Adapter, log_p: Float[Tensor, "paragraph pos d_vocab"]
    ) -> Float[Tensor, " paragraph"]:
        """KL(other model || model) along the targets' continuations, nats/token."""
        targets = self.targets

        def kl_of_batch(batch: slice) -> Tensor:
            log_q = continuation_log_probs(adapter, targets, batch)
            return kl_divergence(log_p[batch].to(log_q.device), log_q).mean(-1).cpu()

        n_pos = targets.inputs.shape[1]
        size = rows_that_fit(adapter, n_pos, 2 * targets.n_continuation, self.memory_budget)
        with adapter.preserving_state():
            return map_batches(len(targets), size, kl_of_batch)


def own_prefix_measures(scores: Continuation) -> dict[str, Float[Tensor, " paragraph"]]:
    """EM, NLL, greedy share and longest run of continuations behind all true tokens."""
    return {
        "em": scores.em.float(),
        "nll": scores.nll,
        "loose_match": scores.correct.float().mean(-1),
        "longest_run": longest_runs(scores.correct).float(),
    }


def longest_runs(correct: Bool[Tensor, "paragraph pos"]) -> Int[Tensor, " paragraph"]:
    """Tokens of the longest stretch that is recited, from any entry in the continuation."""
    run = torch.zeros(len(correct), dtype=torch.long)
    longest = run
    for column in correct.unbind(-1):
        run = (run + 1) * column
        longest = torch.maximum(longest, run)
    return longest


def draw_attacks(
    targets: Paragraphs, fillers: Paragraphs, n_ctx: int, n_draws: int, seed: int
) -> dict[str, list[Paragraphs]]:
    """`n_draws` of every sort of attack; other tokens come from `fillers`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [attack(targets, fillers, n_ctx, generator) for _ in range(n_draws)]
        for name, attack in ATTACKS.items()
    }


def recased(targets: Paragraphs, tokenizer: object) -> Paragraphs | None:
    """The targets behind their prefixes in capitals; None without a tokenizer.

    Capitals take more tokens. The last ones are kept, as many as the shortest has, at most a
    prefix.
    """
    encode = getattr(tokenizer, "encode", None)
    decode = getattr(tokenizer, "decode", None)
    if encode is None or decode is None:
        return None
    rows = [
        encode(decode(prefix).upper(), add_special_tokens=False)
        for prefix in targets.prefix.tolist()
    ]
    n = min([targets.n_prefix, *map(len, rows)])
    if n < 1:
        return None
    prefix = torch.tensor([row[-n:] for row in rows])
    return targets.with_ids(torch.cat([prefix, targets.continuation], 1), n)


def _largest(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.float() for value in values]).amax(0)
