"""Masks and searches of an edit: for all targets together, or for one target after another.

The weights are scored at the model as it is, and the top fraction is a fixed mask. A search then
optimises a change of these weights. Taking several targets one by one repeats both for each target,
at the weights that the earlier targets changed; a second round repeats it for targets that a later
one brought back. The mask of the edit is then the union of the masks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.progress import bar
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.edit import Stopped
from memcircuits.editing.masks import Candidates, Mask, named_mask
from memcircuits.editing.optimization import (
    AdamSteps,
    SearchResult,
    Stepper,
    TrustRegion,
    scale_back,
    search,
)
from memcircuits.editing.recipe import EditOptions
from memcircuits.editing.unlearning_objective import (
    EditObjective,
    ReferenceDistribution,
    Targets,
    history_row,
)
from memcircuits.editing.whitening import WhitenedSteps, inverse_roots
from memcircuits.measure.gradients import iter_paragraph_gradients
from memcircuits.models.adapter import Adapter


@dataclass(frozen=True)
class Editor:
    """What all targets of an edit share.

    Changes stay in the model until `undo` is closed, which takes all of them back.

    Attributes:
        adapter: the model.
        options: the options of the edit.
        candidates: the weights that may be chosen.
        curvature: of the controls, where the recipe uses it.
        seen: controls of the KL term, where the recipe has one.
        held_out: controls of the KL budget.
        generator: of random masks and of the controls' draws.
        undo: restores the weights of each mask.
    """

    adapter: Adapter
    options: EditOptions
    candidates: Candidates
    curvature: Curvature | None
    seen: ReferenceDistribution | None
    held_out: ReferenceDistribution
    generator: torch.Generator
    undo: contextlib.ExitStack

    def edit_together(
        self, targets: Targets, progress: bool, *, resample: bool = False
    ) -> tuple[Mask, SearchResult]:
        """One mask and one search for all targets; the change found is in the model afterwards.

        Args:
            targets: the paragraphs that are to change.
            progress: show a bar on stderr.
            resample: estimate the curvature again, at the weights as they are.
        """
        options, recipe = self.options, self.options.recipe
        mask = self._choose_mask(targets)
        stepper = self._stepper(mask, resample)
        objective = EditObjective(
            targets=targets,
            held_out=self.held_out,
            kl_budget=math.inf if options.kl_budget is None else options.kl_budget,
            seen=self.seen,
            kl_weight=recipe.kl_weight,
            control_batch=recipe.control_batch,
            generator=self.generator,
        )
        original = self.undo.enter_context(mask.restored())
        result = search(
            objective,
            stepper,
            mask,
            original,
            steps=recipe.steps,
            label="edit",
            refine=scale_back(objective, mask, original) if recipe.shrink else None,
            progress=progress,
        )
        if result.change is None:  # even no change at all was over the budget
            result = replace(result, change=torch.zeros(len(mask), device=mask.device))
        assert result.change is not None
        mask.add(original, result.change)
        return mask, result

    def edit_one_by_one(self, targets: Targets, progress: bool) -> tuple[Mask, SearchResult]:
        """A mask and a search for each target that is not reached yet.

        Returns:
            The union of the masks; the history has a row before the first target and one after
            each. The changes are in the model.
        """
        masks: list[Mask] = []
        rows: list[dict[str, float]] = []
        over_budget = False

        def measure() -> Tensor:
            measures, _ = targets.evaluate()
            kl = self.held_out.mean_kl(self.adapter, self.options.memory_budget)
            rows.append(history_row(measures) | {"kl": kl})
            return targets.reached(measures)

        reached = measure()
        # The second round repeats the targets that a later one brought back.
        turns = [*range(len(targets)), *range(len(targets))]
        with bar(len(turns), "edit", unit="paragraph", progress=progress) as turns_bar:
            for index in turns:
                if not over_budget and not reached[index]:
                    # The curvature of the unedited model does not hold after many changes.
                    mask, result = self.edit_together(targets[index], False, resample=bool(masks))
                    masks.append(mask)
                    reached = measure()
                    over_budget = result.stopped == "kl"
                turns_bar.update()
        stopped: Stopped = "kl" if over_budget else "steps"
        if reached.all():
            stopped = "em"
        union = self._union(masks or [self._choose_mask(targets)])
        history = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        return union, SearchResult(None, history, len(rows) - 1, stopped)

    def adam_steps(self, mask: Mask, start: Float[Tensor, " weight"]) -> Stepper:
        """Steps of Adam from a change of the mask, as the recipe wants them."""
        recipe = self.options.recipe
        decay_steps = recipe.steps if recipe.decay else None
        if recipe.curvature != "inputs":
            unit = torch.ones_like(start)
            return AdamSteps(unit, recipe.learning_rate, decay_steps=decay_steps, start=start)
        assert self.seen is not None
        roots = inverse_roots(self.adapter, mask, self.seen.paragraphs, self.options.memory_budget)
        return WhitenedSteps(mask, roots, recipe.learning_rate, decay_steps, start)

    def _stepper(self, mask: Mask, resample: bool) -> Stepper:
        recipe = self.options.recipe
        if recipe.takes_adam or self.curvature is None:
            return self.adam_steps(mask, torch.zeros(len(mask), device=mask.device))
        full = recipe.curvature == "full"
        cost = self.curvature.restrict_to(mask, full=full, resample=resample)
        return TrustRegion(cost, recipe.step_kl)

    def _choose_mask(self, targets: Targets) -> Mask:
        strategy, scores = self.options.mask, None
        if strategy not in ("random", "all"):
            scores = self._scores(targets)
        return self.candidates.choose(self.options.fraction, scores, strategy, self.generator)

    def _scores(self, targets: Targets) -> list[Tensor]:
        """Root of the summed squared gradients, with `curved_mask` divided by the curvature's."""
        weights = self.candidates.weights
        scores = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
        # Over paragraphs the squares are added, so that opposite gradients do not cancel.
        for _, (squares,) in iter_paragraph_gradients(
            self.adapter,
            targets.optimized,
            weights,
            targets.row_losses,
            lambda _, gradient: gradient.float().square().sum(0),
            self.options.memory_budget,
        ):
            for weight, score, square in zip(weights, scores, squares, strict=True):
                weight.split(score).add_(square)
        for weight, score in zip(weights, scores, strict=True):
            score.sqrt_()
            if self.options.recipe.curved_mask:
                assert self.curvature is not None
                score.div_(self.curvature.root_of(weight))
        return scores

    def _union(self, masks: Sequence[Mask]) -> Mask:
        indices: dict[str, list[Tensor]] = {
            f"{w.layer}.{w.component}": [] for w in self.candidates.weights
        }
        for mask in masks:
            for name, index in zip(mask.named, mask.indices, strict=True):
                indices[name].append(index)
        union = {name: torch.cat(parts).unique() for name, parts in indices.items() if parts}
        return named_mask(self.adapter, union, len(self.candidates))
