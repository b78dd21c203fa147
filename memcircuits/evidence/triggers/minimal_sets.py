"""The smallest sets of prefix tokens that stop a recitation, and that start it.

*Stopping* is a greedy search. Replace the token whose replacement lowers EM most (among equals,
raises NLL most), keep it replaced, and repeat until EM is at most a threshold. The number of tokens
replaced is an upper bound of the size of the smallest set.

*Starting* drops tokens from the front of the prefix: what is the shortest suffix of the prefix
after which the model recites as much as after all of it? Dropping tokens shifts all positions, and
that alone disturbs a model with learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.statistics import bootstrap_interval, group_means, group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.replacements import Replacement, choose_tokens
from memcircuits.evidence.triggers.scoring import most_destructive, score_replacements
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MinimalSets(Result, kind="minimal-sets"):
    """Sets of prefix tokens that stop the recitation, and suffixes of the prefix that start it.

    Attributes:
        positions: prefix positions replaced, in order, [paragraph, step]; -1 once the recitation
            has stopped.
        replacements: the token ids put there, [paragraph, step]; -1 likewise.
        em: tokens recited after each step, [paragraph, step].
        baseline_em: with nothing replaced, [paragraph].
        suffix_em: tokens recited when only the last 1, 2, ... prefix tokens are given,
            [paragraph, length].
        threshold: the recitation counts as stopped when EM is at most this, tokens.
        names: one per paragraph.
        provenance: where the numbers come from.
        notes: what the reader must know.
        groups: number of each paragraph's independent group, [paragraph]; None: each is its own.
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
    groups: Int[Tensor, " paragraph"] | None = None

    @property
    def stopping(self) -> Float[Tensor, " paragraph"]:
        """Number of tokens replaced until the recitation stopped; NaN where it did not."""
        steps = (self.positions >= 0).sum(-1).float()
        return steps.where(self.em[:, -1] <= self.threshold, torch.nan)

    @property
    def starting(self) -> Int[Tensor, " paragraph"]:
        """Length of the shortest suffix of the prefix after which as much is recited, tokens."""
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
        from memcircuits.display import figures

        after_each_step = torch.cat([self.baseline_em[:, None], self.em], 1)
        return figures.minimal_sets(
            _mean_curve("replaced", 0, after_each_step, self.groups),
            _mean_curve("given", 1, self.suffix_em, self.groups),
            title="How few prefix tokens stop and start the recitation",
        )

    def __str__(self) -> str:
        stopped = ~self.stopping.isnan()
        text = f"stopped {int(stopped.sum())} of {len(self.names)}"
        if stopped.any():
            text += f", median {float(self.stopping[stopped].median()):.0f} tokens"
        return f"{text}; started by a median of {float(self.starting.float().median()):.0f} tokens"


def _mean_curve(
    name: str,
    first: int,
    em: Int[Tensor, "paragraph x"],
    groups: Int[Tensor, " paragraph"] | None,
) -> pd.DataFrame:
    """Mean EM over groups with its interval, against `name` = first, first + 1, ..."""
    import pandas as pd

    low, high = bootstrap_interval(em.float(), groups)
    return pd.DataFrame(
        {
            name: range(first, first + em.shape[1]),
            "em": group_means(em.float(), groups).mean(0).numpy(),
            "em_low": low.numpy(),
            "em_high": high.numpy(),
        }
    )


@plain_torch()
def minimal_sets(  # noqa: PLR0913
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    threshold: int | None = None,
    max_tokens: int = 5,
    replacement: Replacement = "random",
    draws: int = 1,
    unigrams: UnigramTable | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> MinimalSets:
    """The smallest sets of prefix tokens that stop and that start the recitation.

    Args:
        model: the model.
        paragraphs: the paragraphs.
        threshold: EM at which a recitation counts as stopped, tokens; by default a fifth of the
            continuation, as for controls.
        max_tokens: maximum number of tokens to replace.
        replacement: how tokens are chosen, see `perturb_prefix`.
        draws: candidates per position.
        unigrams: token counts for `frequency`.
        seed: of the random draws.
        memory_budget: maximum bytes per batch; by default a third of the free memory.
        progress: show a bar on stderr.

    Returns:
        `MinimalSets`.

    Raises:
        InputError: as `perturb_prefix`, or for a threshold outside [0, n_continuation).
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    at_least("max_tokens", max_tokens, 1)
    threshold = paragraphs.n_continuation // 5 if threshold is None else threshold
    if not 0 <= threshold < paragraphs.n_continuation:
        raise InputError(
            "threshold", threshold, f"give a number of tokens in [0, {paragraphs.n_continuation})"
        )
    max_tokens = min(max_tokens, paragraphs.n_prefix)
    with adapter.preserving_state():
        tokens, notes = choose_tokens(
            adapter, paragraphs, replacement, draws, unigrams, seed, memory_budget
        )
        suffix_em = _suffix_em(adapter, paragraphs, memory_budget, progress)
        search = _Search(adapter, paragraphs, tokens, threshold, memory_budget)
        stopped = search.run(suffix_em[:, -1], max_tokens, progress)
    return MinimalSets(
        positions=stopped.positions,
        replacements=stopped.replacements,
        em=stopped.em,
        baseline_em=suffix_em[:, -1],
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
        notes=(*notes, *group_notes({"given": paragraphs.groups})),
        groups=paragraphs.groups,
    )


class _Steps(NamedTuple):
    positions: Int[Tensor, "paragraph step"]
    replacements: Int[Tensor, "paragraph step"]
    em: Int[Tensor, "paragraph step"]


@dataclass(frozen=True)
class _Search:
    """Greedy search of the tokens whose replacement stops a recitation."""

    adapter: Adapter
    paragraphs: Paragraphs
    tokens: Int[Tensor, "paragraph pos draw"]
    threshold: int
    memory_budget: int | None

    def run(
        self, baseline_em: Int[Tensor, " paragraph"], max_tokens: int, progress: bool
    ) -> _Steps:
        """Replace one more token of every paragraph still recited, at most `max_tokens` times."""
        n, n_prefix = len(self.paragraphs), self.paragraphs.n_prefix
        positions = torch.full((n, max_tokens), -1)
        replacements = positions.clone()
        em = baseline_em[:, None].repeat(1, max_tokens)
        ids, replaced = self.paragraphs.ids.clone(), torch.zeros(n, n_prefix, dtype=torch.bool)
        with bar(max_tokens, "stop", unit="token", progress=progress) as progress_bar:
            for step in range(max_tokens):
                rows = (em[:, step] > self.threshold).nonzero().flatten()
                if not len(rows):
                    break
                position, draw, em_left = self._best_replacement(rows, ids[rows], replaced[rows])
                positions[rows, step] = position
                replacements[rows, step] = self.tokens[rows, position, draw]
                ids[rows, position] = replacements[rows, step]
                replaced[rows, position] = True
                em[rows, step:] = em_left[:, None]
                progress_bar.update(1)
        return _Steps(positions, replacements, em)

    def _best_replacement(
        self,
        rows: Int[Tensor, " row"],
        ids: Int[Tensor, "row pos"],
        replaced: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Position, draw and EM of the most destructive further replacement of each paragraph."""
        paragraphs = self.paragraphs[rows].with_ids(ids)
        em, nll = score_replacements(
            self.adapter, paragraphs, self.tokens[rows], self.memory_budget
        )
        # A token is replaced once: replacing it again is worse than anything else.
        em = em.masked_fill(replaced[:, :, None], self.paragraphs.n_continuation + 1)
        position, draw = most_destructive(em, nll)
        return position, draw, em[torch.arange(len(rows)), position, draw]


def _suffix_em(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None, progress: bool
) -> Int[Tensor, "paragraph length"]:
    """EM when only the last 1, 2, ... prefix tokens are given."""
    columns = []
    with bar(paragraphs.n_prefix, "start", unit="length", progress=progress) as progress_bar:
        for length in range(1, paragraphs.n_prefix + 1):
            ids = paragraphs.ids[:, paragraphs.n_prefix - length :]
            short = paragraphs.with_ids(ids, n_prefix=length)
            columns.append(score_paragraphs(adapter, short, memory_budget=memory_budget).em)
            progress_bar.update(1)
    return torch.stack(columns, 1)
