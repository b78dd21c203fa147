"""Which heads does every subnetwork that recites have? The heuristic core (arXiv 2403.03942).

Bhaskar, Friedman and Chen (2024) prune a model many times with different seeds. The subnetworks do
the same task about equally well and generalise differently, but all of them share some heads, the
*core*. Here the task is the continuation of memorized paragraphs, and of others:

1. A mask over heads and MLPs is trained for each seed and either set
   (`memcircuits.evidence.subnetworks.hard_concrete`), its loss the NLL of one paragraph of the set
   at each step. Parts with a gate of 0 give their mean over controls.
2. The subnetwork of a seed is the (1 - sparsity) of all parts with the highest log-odds.
3. The core of a set is what all its subnetworks have. Its heads that the other set's core lacks are
   those of recitation.
4. On paragraphs that no mask was trained on: EM, accuracy and NLL of the whole model, the
   subnetworks, either core alone, the model without it, and the model without what only the core
   of the memorized paragraphs has.
5. The *effective size* is the smallest number of parts whose accuracy is within 3 points of the
   whole model's. There, the smallest of many subnetworks of several sparsities is taken; here the
   parts of one run are nested by their log-odds, and the size is found by bisection, which assumes
   that more parts predict better.

How often chance makes a core: with `shuffles`, the labels memorized and control are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, fraction
from memcircuits.base.progress import bar
from memcircuits.base.statistics import count_groups, group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.draws import random_order, split_groups
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.subnetworks.hard_concrete import (
    STEPS,
    initial_log_odds,
    n_kept,
    train_gates,
)
from memcircuits.evidence.subnetworks.mean_ablation import MeanAblation
from memcircuits.evidence.subnetworks.results import SETS, Core, SetName
from memcircuits.measure.comparable_sets import comparable_sets
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

TOLERANCE = 0.03
"""Loss of accuracy that an effective size allows (3 points in the paper)."""

_MIN_TO_SPLIT = 8  # paragraphs; with fewer, masks are tested on those that they were trained on
_MAX_TESTED = 8  # paragraphs of a set


@plain_torch()
def core(  # noqa: PLR0913 (keyword-only options of a public function)
    model: Model,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    seeds: int = 12,
    sparsity: float = 0.5,
    steps: int = STEPS,
    max_paragraphs: int = 24,
    shuffles: int = 0,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Core:
    """Train subnetworks that recite, and others for ordinary text; find what all of them share.

    Args:
        model: the model.
        memorized: paragraphs that the model recites.
        control: others of the same length; a removed part gives its mean over them.
        seeds: number of subnetworks of either set.
        sparsity: share of the heads and MLPs that a subnetwork lacks, in (0, 1).
        steps: number of training steps, of one paragraph per seed each.
        max_paragraphs: maximum number of either set that masks are trained and tested on.
        shuffles: number of times that everything is done again with shuffled labels.
        seed: seed of all random draws.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Core`.

    Raises:
        InputError: for an option out of range, unusable paragraphs, or a control that is among the
            memorized paragraphs.

    Example:
        >>> shared = mc.core(model, memorized, control, seeds=2, steps=3)
        >>> shared.kept.shape  # set, seed, part: 48 heads and 6 MLPs
        torch.Size([2, 2, 54])
    """
    options = {
        "seeds": seeds,
        "sparsity": sparsity,
        "steps": steps,
        "max_paragraphs": max_paragraphs,
        "shuffles": shuffles,
        "seed": seed,
    }
    _check(options)
    adapter = adapt(model)
    generator = torch.Generator().manual_seed(seed)
    groups = comparable_sets(adapter, memorized, control, memory_budget)
    notes: list[str] = []
    drawn = [group.sample(max_paragraphs, generator) for group in groups]
    search = _Search(adapter, groups[1], seeds, sparsity, steps, memory_budget)
    total = 2 * steps * (1 + shuffles)
    with (
        adapter.preserving_state(),
        bar(total, "masks", unit="step", progress=progress) as steps_bar,
    ):
        halves = [
            _split(group, of, generator, notes) for of, group in zip(SETS, drawn, strict=True)
        ]
        trained, tested = zip(*halves, strict=True)
        log_odds = search.train(trained, generator, steps_bar.update)
        shuffled = [
            search.kept(search.train(_shuffle(trained, generator), generator, steps_bar.update))
            for _ in range(shuffles)
        ]
        kept = search.kept(log_odds)
        sizes = [search.effective_size(p, odds) for p, odds in zip(tested, log_odds, strict=True)]
        scores = search.scores(tested, kept)
    groups_of = {str(of): group.groups for of, group in zip(SETS, tested, strict=True)}
    none = torch.zeros(0, *kept.shape, dtype=torch.bool)
    return Core(
        log_odds=log_odds.cpu(),
        kept=kept.cpu(),
        effective_size=torch.stack(sizes).cpu(),
        scores=scores,
        n_layers=adapter.n_layers,
        n_heads=adapter.n_heads,
        shuffled=torch.stack(shuffled).cpu() if shuffled else none,
        provenance=Provenance.of(
            adapter,
            {"memorized": groups[0], "control": groups[1]},
            tolerance=TOLERANCE,
            **options,
        ),
        notes=(*notes, *group_notes(groups_of)),
        groups=groups_of,
    )


def _check(options: Mapping[str, Any]) -> None:
    """Raise `InputError` unless every option is in its range."""
    for name in ("seeds", "steps", "max_paragraphs"):
        at_least(name, options[name], 1)
    for name in ("shuffles", "seed"):
        at_least(name, options[name], 0)
    sparsity = options["sparsity"]
    fraction("sparsity", sparsity)
    if sparsity == 1:
        raise InputError("sparsity", sparsity, "give a number below 1: a subnetwork keeps a part")


class _Search:
    """Subnetworks of one model at one sparsity, for any sets of paragraphs."""

    def __init__(
        self,
        adapter: Adapter,
        reference: Paragraphs,
        seeds: int,
        sparsity: float,
        steps: int,
        memory_budget: int | None,
    ) -> None:
        self._adapter = adapter
        with adapter.preserving_state():
            self._ablation = MeanAblation(adapter, reference, ("z", "mlp_out"))
        self._seeds, self._sparsity, self._steps = seeds, sparsity, steps
        self._memory_budget = memory_budget

    def train(
        self,
        groups: Sequence[Paragraphs],
        generator: torch.Generator,
        done: Callable[[int], None],
    ) -> Float[Tensor, "set seed part"]:
        """Log-odds of every part, of masks trained for each of the sets."""
        n_gates, device = self._ablation.n_gates, self._adapter.device
        return torch.stack(
            [
                train_gates(
                    self._loss(group, generator),
                    initial_log_odds(self._seeds, n_gates, generator, device),
                    self._sparsity,
                    generator,
                    steps=self._steps,
                    done=done,
                )
                for group in groups
            ]
        )

    def _loss(
        self, paragraphs: Paragraphs, generator: torch.Generator
    ) -> Callable[[Tensor], Tensor]:
        """NLL of a random paragraph under each seed's gates, nats/token."""

        def loss(gates: Float[Tensor, "seed part"]) -> Float[Tensor, " seed"]:
            rows = torch.randint(len(paragraphs), (len(gates),), generator=generator)
            return self._ablation.score(paragraphs, rows, gates).nll

        return loss

    def kept(self, log_odds: Float[Tensor, "*set seed part"]) -> Bool[Tensor, "*set seed part"]:
        """The subnetworks: the parts with the highest log-odds."""
        n = n_kept(self._sparsity, log_odds.shape[-1])
        return _largest(log_odds, torch.full(log_odds.shape[:-1], n, device=log_odds.device))

    def effective_size(
        self, paragraphs: Paragraphs, log_odds: Float[Tensor, "seed part"]
    ) -> Int[Tensor, " seed"]:
        """The fewest parts within `TOLERANCE` of the whole model's accuracy, by bisection."""
        n_parts = log_odds.shape[-1]
        whole = self._measure(paragraphs, torch.ones_like(log_odds[:1]).bool())[0, :, 1].mean()
        # `enough` parts reach it, `few` do not.
        few = torch.zeros(len(log_odds), dtype=torch.long, device=log_odds.device)
        enough = torch.full_like(few, n_parts)
        while bool((enough - few > 1).any()):
            size = (few + enough) // 2
            accuracy = self._measure(paragraphs, _largest(log_odds, size))[..., 1].mean(-1)
            reached = (accuracy >= whole - TOLERANCE).to(few.device)
            enough, few = torch.where(reached, size, enough), torch.where(reached, few, size)
        return enough

    def scores(
        self, groups: Sequence[Paragraphs], kept: Bool[Tensor, "set seed part"]
    ) -> dict[str, Float[Tensor, "paragraph measure"]]:
        """What `Core.scores` holds."""
        cores = kept.all(1)
        conditions = {"whole": torch.ones_like(cores[0])}
        for of, parts in zip(SETS, cores, strict=True):
            conditions |= {f"only {of}": parts, f"without {of}": ~parts}
        conditions["without own"] = ~(cores[0] & ~cores[1])
        results: dict[str, Tensor] = {}
        for of, group, subnetworks in zip(SETS, groups, kept, strict=True):
            measured = self._measure(group, torch.stack(list(conditions.values())))
            results |= {f"{of}, {name}": measured[i] for i, name in enumerate(conditions)}
            results[f"{of}, subnetworks"] = self._measure(group, subnetworks).mean(0)
        return results

    def _measure(
        self, paragraphs: Paragraphs, masks: Bool[Tensor, "mask part"]
    ) -> Float[Tensor, "mask paragraph measure"]:
        """EM, accuracy and NLL of every paragraph under every mask."""
        n = len(paragraphs)

        def one_batch(batch: slice) -> Float[Tensor, "batch measure"]:
            pairs = torch.arange(batch.start, batch.stop)
            scores = self._ablation.score(paragraphs, pairs % n, masks[pairs // n].float())
            return torch.stack(
                [scores.em.float(), scores.correct.float().mean(-1), scores.nll], -1
            ).cpu()

        size = rows_that_fit(
            self._adapter,
            paragraphs.inputs.shape[1],
            paragraphs.n_continuation,
            self._memory_budget,
        )
        return map_batches(len(masks) * n, size, one_batch).view(len(masks), n, -1)


def _largest(
    log_odds: Float[Tensor, "*run part"], size: Int[Tensor, "*run"]
) -> Bool[Tensor, "*run part"]:
    """The `size` parts with the highest log-odds of each run; of equals the first."""
    order = log_odds.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    return rank < size.unsqueeze(-1)


def _split(
    paragraphs: Paragraphs, of: SetName, generator: torch.Generator, notes: list[str]
) -> tuple[Paragraphs, Paragraphs]:
    """Paragraphs to train masks on, and independent others to test them on."""
    n = count_groups(paragraphs.groups)
    if n < _MIN_TO_SPLIT:
        notes.append(
            f"{of}: with {n} paragraphs, fewer than {_MIN_TO_SPLIT}, masks were tested on those "
            "that they were trained on"
        )
        return paragraphs, paragraphs
    order = random_order(paragraphs.groups, generator)
    tested, trained = split_groups(paragraphs.groups, order, min(n // 2, _MAX_TESTED))
    return paragraphs[trained], paragraphs[tested]


def _shuffle(groups: Sequence[Paragraphs], generator: torch.Generator) -> list[Paragraphs]:
    """Both sets with their labels shuffled, as many paragraphs of each as before."""
    pooled = groups[0] + groups[1]
    order = torch.randperm(len(pooled), generator=generator)
    return [pooled[order[: len(groups[0])]], pooled[order[len(groups[0]) :]]]
