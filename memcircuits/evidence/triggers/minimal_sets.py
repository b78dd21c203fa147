"""How few prefix tokens stop a recitation, and how few start it?

*Stopping* is a greedy search: replace the token that lowers EM most (among equals raises NLL most),
keep it replaced, and go on until hardly anything is recited. What it finds is an upper bound of the
smallest set. *Starting* drops tokens from the front of the prefix: the paragraph gets shorter and
all positions shift, which a model with learned positions feels by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.progress import bar
from memcircuits.core.statistics import bootstrap_interval
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.replacements import (
    choose_tokens,
    measure_replaced,
    most_destructive,
)
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MinimalSets(Result, kind="minimal-sets"):
    """How few prefix tokens stop the recitation, and how few start it.

    Attributes:
        positions: prefix positions replaced, in order, [paragraph, step]; -1 once it has stopped.
        replacements: the ids put there, [paragraph, step]; -1 likewise.
        em: tokens recited after each step, [paragraph, step].
        baseline_em: with nothing replaced, [paragraph].
        suffix_em: tokens recited when only the last 1, 2, ... prefix tokens are given,
            [paragraph, length].
        threshold: the recitation has stopped when EM is at most this.
        names: one per paragraph.
        provenance: where the numbers come from.
        notes: what the reader must know.
    """

    positions: Int[Tensor, "paragraph step"]
    replacements: Int[Tensor, "paragraph step"]
    em: Int[Tensor, "paragraph step"]
    baseline_em: Int[Tensor, " paragraph"]
    suffix_em: Int[Tensor, "paragraph length"]
    threshold: int
    names: tuple[str, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    @property
    def stopping(self) -> Float[Tensor, " paragraph"]:
        """Tokens replaced until the recitation stopped; NaN where the search gave up."""
        steps = (self.positions >= 0).sum(-1).float()
        return steps.where(self.em[:, -1] <= self.threshold, torch.nan)

    @property
    def starting(self) -> Int[Tensor, " paragraph"]:
        """Length of the shortest suffix of the prefix that recites as much as all of it."""
        return (self.suffix_em >= self.baseline_em[:, None]).long().argmax(-1) + 1

    def to_frame(self) -> pd.DataFrame:
        """Columns `id, baseline_em, stopping, positions, em, starting`."""
        import pandas as pd

        return pd.DataFrame(
            {
                "id": self.names,
                "baseline_em": self.baseline_em.numpy(),
                "stopping": self.stopping.numpy(),
                "positions": [[p for p in row if p >= 0] for row in self.positions.tolist()],
                "em": self.em[:, -1].numpy(),
                "starting": self.starting.numpy(),
            }
        )

    def figure(self) -> Any:
        """EM against tokens replaced, and against tokens given (plotly)."""
        import pandas as pd

        from memcircuits.display import figures

        def curve(x: str, first: int, em: Tensor) -> pd.DataFrame:
            low, high = bootstrap_interval(em.float())
            return pd.DataFrame(
                {
                    x: range(first, first + em.shape[1]),
                    "em": em.float().mean(0).numpy(),
                    "em_low": low.numpy(),
                    "em_high": high.numpy(),
                }
            )

        return figures.minimal_sets(
            curve("replaced", 0, torch.cat([self.baseline_em[:, None], self.em], 1)),
            curve("given", 1, self.suffix_em),
            title="How few prefix tokens stop and start the recitation",
        )

    def __str__(self) -> str:
        stopped = ~self.stopping.isnan()
        few = f", median {float(self.stopping[stopped].median()):.0f} tokens" * bool(stopped.any())
        return (
            f"stopped {int(stopped.sum())} of {len(self.names)}{few}; "
            f"started by a median of {float(self.starting.float().median()):.0f} tokens"
        )


def minimal_sets(
    model: Any,
    paragraphs: Any,
    *,
    threshold: int | None = None,
    max_tokens: int = 5,
    replacement: str = "random",
    draws: int = 1,
    unigrams: UnigramTable | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> MinimalSets:
    """The smallest sets of prefix tokens that stop and that start the recitation.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        threshold: EM at which a recitation counts as stopped; by default a fifth of the
            continuation, as for controls.
        max_tokens: give up after so many.
        replacement: how tokens are chosen, see `perturb_prefix`.
        draws: candidates per position.
        unigrams: token counts for `frequency`.
        seed: of the random draws.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `MinimalSets`.

    Raises:
        InputError: as `perturb_prefix`, or for a threshold outside [0, n_continuation).
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    at_least("max_tokens", max_tokens, 1)
    threshold = paragraphs.n_continuation // 5 if threshold is None else threshold
    if not 0 <= threshold < paragraphs.n_continuation:
        raise InputError(
            "threshold", threshold, f"give a number of tokens in [0, {paragraphs.n_continuation})"
        )
    n, n_prefix = len(paragraphs), paragraphs.n_prefix
    max_tokens = min(max_tokens, n_prefix)
    positions = torch.full((n, max_tokens), -1)
    replacements = positions.clone()
    with adapter.preserving_state():
        tokens, notes = choose_tokens(
            adapter, paragraphs, replacement, draws, unigrams, seed, memory_budget
        )
        suffix_em = _suffix_em(adapter, paragraphs, memory_budget, progress)
        baseline_em = suffix_em[:, -1]
        em = baseline_em[:, None].repeat(1, max_tokens)
        ids, free = paragraphs.ids.clone(), torch.ones(n, n_prefix, dtype=torch.bool)
        with bar(max_tokens, "stop", unit="token", progress=progress) as shown:
            for step in range(max_tokens):
                rows = (em[:, step] > threshold).nonzero().flatten()
                if not len(rows):
                    break
                found, nll = measure_replaced(
                    adapter, ids[rows], n_prefix, tokens[rows], memory_budget
                )
                found = found.masked_fill(~free[rows, :, None], paragraphs.n_continuation + 1)
                worst = most_destructive(found, nll)
                position, draw = worst // draws, worst % draws
                positions[rows, step] = position
                replacements[rows, step] = tokens[rows, position, draw]
                ids[rows, position] = replacements[rows, step]
                free[rows, position] = False
                em[rows, step:] = found.flatten(1).gather(1, worst[:, None])
                shown.update(1)
    return MinimalSets(
        positions=positions,
        replacements=replacements,
        em=em,
        baseline_em=baseline_em,
        suffix_em=suffix_em,
        threshold=threshold,
        names=paragraphs.names,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            threshold=threshold,
            max_tokens=max_tokens,
            replacement=replacement,
            draws=draws,
            seed=seed,
            unigrams=None if unigrams is None else unigrams.source,
        ),
        notes=notes,
    )


def _suffix_em(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None, progress: bool
) -> Int[Tensor, "paragraph length"]:
    columns = []
    with bar(paragraphs.n_prefix, "start", unit="length", progress=progress) as shown:
        for length in range(1, paragraphs.n_prefix + 1):
            short = Paragraphs(paragraphs.ids[:, paragraphs.n_prefix - length :], length)
            columns.append(score_paragraphs(adapter, short, memory_budget=memory_budget).em)
            shown.update(1)
    return torch.stack(columns, 1)
