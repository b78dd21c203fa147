"""Do the best heads stay the best under other choices? Other ablations, and other controls.

A score depends on what a head is replaced by and on what it is compared with. `other_choices`
measures the scores of a few heads, those at the top of a ranking, under

* each of the other ablations (zero, mean, resample), on the same paragraphs;
* the half of the controls with the lower loss: the loss of a recitation is near zero and has
  further to rise than that of an average control;
* controls with a loss as low as a recitation's: the model's own greedy continuations of the
  controls' prefixes.

Nothing else is measured: a few heads cost a small part of the sweep over all of them. A ranking by
another score than the effect has no other choices here;
`memcircuits.evidence.control_choices` compares whole rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.heads import Head
from memcircuits.base.statistics import (
    bootstrap_means,
    count_groups,
    finite_rows,
    group_means,
    interval,
)
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.ablation import Ablation, Mode, effects_of_ways
from memcircuits.evidence.ranking import Ranking
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Adapter

MAX_OWN = 40
"""Maximum number of controls whose prefix is continued by the model."""


@dataclass(frozen=True)
class Choice:
    """The scores of some heads under one choice of ablation and controls.

    Attributes:
        name: what was chosen.
        score: memorized minus control effect of each head, nats/token.
        ci: its 95 % bootstrap interval; NaN from a single group.
        control_loss: mean loss of the controls, nats/token.
        n_control: number of independent groups of controls.
    """

    name: str
    score: Float[Tensor, " head"]
    ci: Float[Tensor, "bound head"]
    control_loss: float
    n_control: int


def other_choices(
    ranking: Ranking,
    adapter: Adapter,
    heads: Sequence[Head],
    loss: Float[Tensor, " group"],
    *,
    progress: bool,
) -> list[Choice]:
    """The scores of some heads of a ranking, as ranked and under other choices.

    Args:
        ranking: the ranking.
        adapter: its model.
        heads: which heads.
        loss: loss of each independent group of its controls, nats/token.
        progress: show bars on stderr.

    Returns:
        The choices, the ranking's own first; none without heads, or if it ranks by another score.
    """
    options = ranking.provenance.options
    if not heads or options.get("score", "effect") != "effect":
        return []
    sweep = _Sweep(ranking, adapter, heads, progress)
    ranked: Mode = options["mode"]
    modes = [mode for mode in get_args(Mode) if mode != ranked]
    memorized, control = sweep.as_ranked("memorized"), sweep.as_ranked("control")
    choices = [sweep.compare(f"{ranked} ablation, as ranked", memorized, control, loss)]
    others = [
        sweep.effects(paragraphs, modes) for paragraphs in (ranking.memorized, ranking.control)
    ]
    for i, mode in enumerate(modes):
        choices.append(sweep.compare(f"{mode} ablation", others[0][i], others[1][i], loss))

    lower = loss.argsort(stable=True)[: (len(loss) + 1) // 2]
    if len(lower) > 1:
        name = "half of the controls, of lower loss"
        choices.append(sweep.compare(name, memorized, control[lower], loss[lower]))
    if options.get("control_text") == "own":
        return choices
    first = list(range(min(MAX_OWN, len(ranking.control))))
    own = greedy_continuations(adapter, ranking.control[first], progress=progress)
    name = "the model's own text as controls"
    own_loss = group_means(scan(adapter, own, progress=False).nll, own.groups)
    choices.append(sweep.compare(name, memorized, sweep.effects(own, [ranked])[0], own_loss))
    return choices


@dataclass(frozen=True)
class _Sweep:
    """Some heads of a ranking, ablated and compared as the ranking was made."""

    ranking: Ranking
    adapter: Adapter
    heads: Sequence[Head]
    progress: bool

    def as_ranked(self, name: Literal["memorized", "control"]) -> Float[Tensor, "group head"]:
        """Change of the NLL of one set without each head, as the ranking measured it."""
        paragraphs: Paragraphs = getattr(self.ranking, name)
        places = [self.ranking.grid.place(Component("head", *head)) for head in self.heads]
        samples = self.ranking.samples.get(name)  # earlier versions saved none
        # Groups that a column gave are not saved: only where each paragraph is its own group, the
        # samples are known to be in the order of the paragraphs.
        n_groups = count_groups(paragraphs.groups)
        if samples is not None and len(samples) == n_groups == len(paragraphs):
            known = torch.stack([samples[:, layer, column] for layer, column in places], 1)
            if known.isfinite().all():  # not every head of a screen was ablated
                return known
        return self.effects(paragraphs, [self.ranking.provenance.options["mode"]])[0]

    def effects(
        self, paragraphs: Paragraphs, modes: Sequence[Mode]
    ) -> Float[Tensor, "mode group head"]:
        """Change of the NLL without each head; means and samples are those of the controls."""
        seed = int(self.ranking.provenance.options["seed"])
        # A control is never replaced by itself.
        is_reference = torch.equal(paragraphs.ids, self.ranking.control_ids)
        references = {mode: mode != "zero" and not is_reference for mode in modes}
        ways = [
            Ablation(
                self.adapter,
                paragraphs,
                mode=mode,
                reference=self.ranking.control if is_needed else None,
                seed=seed,
            )
            for mode, is_needed in references.items()
        ]
        nll = effects_of_ways(ways, list(self.heads), progress=self.progress)[..., 0]
        return torch.stack([group_means(of_mode, paragraphs.groups) for of_mode in nll.unbind(1)])

    def compare(self, name: str, memorized: Tensor, control: Tensor, loss: Tensor) -> Choice:
        """The score of each head with its interval."""
        options = self.ranking.provenance.options
        generator = torch.Generator().manual_seed(int(options["seed"]))
        sets = [effects[finite_rows(effects)] for effects in (memorized, control)]
        means = [bootstrap_means(effects, int(options["draws"]), generator) for effects in sets]
        ci = interval(means[0] - means[1])
        if min(len(effects) for effects in sets) < 2:
            ci = torch.full_like(ci, torch.nan)
        return Choice(
            name=name,
            score=sets[0].mean(0) - sets[1].mean(0),
            ci=ci,
            control_loss=float(loss[loss.isfinite()].mean()),
            n_control=len(sets[1]),
        )
