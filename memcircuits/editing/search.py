"""TODO."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.core.progress import bar
from memcircuits.editing.curvature import Curvature, Quadratic
from memcircuits.editing.masks import Candidates, Mask, named_mask
from memcircuits.editing.objective import ReferenceDistribution, Targets, history_row
from memcircuits.editing.recipe import Recipe
from memcircuits.measure.gradients import iter_paragraph_gradients, rows_that_fit_backward
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches

SHORTEST = 0.1  # of the first step's length: shorter ones are not tried within the budget


@dataclass(frozen=True)
class Editor:
    """What all targets of an edit share. Changes stay in the model until `undo` is closed."""

    adapter: Adapter
    candidates: Candidates
    fraction: float
    how: str
    seen: ReferenceDistribution | None
    held: ReferenceDistribution
    curvature: Curvature | None
    recipe: Recipe
    kl_budget: float
    generator: torch.Generator
    memory_budget: int | None
    undo: contextlib.ExitStack

    def together(
        self, targets: Targets, progress: bool, *, anew: bool = False
    ) -> tuple[Mask, dict[str, Any]]:
        """One mask for all targets: the mask, and the fields of `Edit` that tell what was done."""
        mask = self._choose(targets)
        cost = None
        if self.curvature is not None and self.recipe.curvature != "none":
            cost = self.curvature.on(mask, together=self.recipe.curvature == "full", anew=anew)
        original = self.undo.enter_context(mask.restored())
        delta, report = Search(self, targets, mask, cost, original).run(progress)
        mask.add(original, delta)
        return mask, report

    def one_by_one(self, targets: Targets, progress: bool) -> tuple[Mask, dict[str, Any]]:
        """A mask and steps for each target: the same of the union of the masks."""
        n = len(targets.memorized)
        masks: list[Mask] = []
        rows: list[dict[str, float]] = []
        spent = False

        def measured() -> Tensor:
            found, _ = targets.read()
            kl = self.held.mean_kl(self.adapter, self.memory_budget)
            rows.append(history_row(found) | {"kl": kl})
            return targets.reached(found)

        reached = measured()
        # The second round is for what a later target brought back.
        with bar(2 * n, "edit", unit="paragraph", progress=progress) as shown:
            for index in (*range(n), *range(n)):
                if not spent and not reached[index]:
                    # What a step costs is another thing at weights that many turns have changed.
                    mask, report = self.together(targets[index], False, anew=bool(masks))
                    masks.append(mask)
                    reached = measured()
                    spent = report["stopped"] == "kl"
                shown.update()
        stopped = "em" if reached.all() else "kl" if spent else "steps"
        union = self._union(masks or [self._choose(targets)])
        history = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        return union, {"history": history, "kept": len(rows) - 1, "stopped": stopped}

    def _union(self, masks: Sequence[Mask]) -> Mask:
        places: dict[str, list[Tensor]] = {
            f"{w.layer}.{w.component}": [] for w in self.candidates.weights
        }
        for mask in masks:
            for name, index in zip(mask.named, mask.indices, strict=True):
                places[name].append(index)
        found = {name: torch.cat(parts).unique() for name, parts in places.items() if parts}
        return named_mask(self.adapter, found, len(self.candidates))

    def _choose(self, targets: Targets) -> Mask:
        scores: list[Tensor] | None = None
        if self.how in ("top", "random-per-tensor"):
            weights = self.candidates.weights
            scores = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
            # Over paragraphs the squares are added: opposite gradients do not cancel.
            for _, (found,) in iter_paragraph_gradients(
                self.adapter,
                targets.aim,
                weights,
                targets.alone,
                lambda _, gradient: gradient.float().square().sum(0),
                self.memory_budget,
            ):
                for weight, score, square in zip(weights, scores, found, strict=True):
                    weight.split(score).add_(square)
            for weight, score in zip(weights, scores, strict=True):
                score.sqrt_()
                if self.recipe.curved_mask:
                    assert self.curvature is not None
                    score.div_(self.curvature.root_of(weight))
        return self.candidates.choose(self.fraction, scores, self.how, self.generator)


@dataclass(frozen=True)
class Search:
    """Steps in the masked weights, each written into the model."""

    editor: Editor
    targets: Targets
    mask: Mask
    cost: Quadratic | None
    original: list[Tensor]

    def run(self, progress: bool) -> tuple[Float[Tensor, " weight"], dict[str, Any]]:
        """The change kept, and the fields of `Edit` that tell how it was found."""
        recipe, budget = self.editor.recipe, self.editor.kl_budget
        device = self.mask.weights[0].parameter.device
        place = torch.nn.Parameter(torch.zeros(len(self.mask), device=device))
        adam = torch.optim.Adam([place], lr=recipe.learning_rate)
        length = longest = recipe.step_kl**0.5
        unit = torch.zeros_like(place)
        rows: list[dict[str, float]] = []
        best, kept, stopped = place.detach().clone(), 0, "steps"
        with bar(recipe.steps, "edit", unit="step", progress=progress) as shown:
            for step in range(recipe.steps + 1):
                delta = place.detach().clone()
                row, reached, slope = self._at(delta)
                last = step == recipe.steps or reached
                # Without a budget it decides nothing before the end.
                row["kl"] = self._held_kl() if last or budget < math.inf else math.nan
                known = [row[key] for key in row if key != "kl" or budget < math.inf]
                if not all(map(math.isfinite, known)):
                    raise InputError(
                        "learning_rate" if self.cost is None else "step_kl",
                        recipe.learning_rate if self.cost is None else recipe.step_kl,
                        f"the loss was not finite at step {step}; the model is restored; "
                        "use a smaller one",
                    )
                rows.append(row)
                if reached and step and recipe.shrink:
                    delta, row = self._shrunk(delta, row)
                    rows.append(row)
                if row["kl"] > budget:
                    if self.cost is None or step == recipe.steps or length < SHORTEST * longest:
                        stopped = "kl"
                        break
                    length /= 2
                    place.data = best - length * unit
                    shown.update()
                    continue
                went_too_far = row["forget"] > rows[kept]["forget"]
                best, kept = delta, len(rows) - 1
                if reached or not slope.any():
                    stopped = "em"
                    break
                if step == recipe.steps:
                    break
                if self.cost is None:
                    place.grad = slope + recipe.kl_weight * self._kl_slope()
                    adam.step()
                else:
                    direction = self.cost.cheapest(slope)
                    unit = self.cost.kl(direction) ** -0.5 * direction
                    length = length / 2 if went_too_far else length
                    place.data -= length * unit
                shown.update()
        history = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        return best, {"history": history, "kept": kept, "stopped": stopped}

    def _shrunk(self, delta: Tensor, row: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        """The smallest multiple of `delta`, to 1/64, that is enough."""
        low, high = 0.0, 1.0
        while high - low > 1 / 64:
            middle = (low + high) / 2
            found, reached, _ = self._at(middle * delta, gradient=False)
            if reached:
                high, row = middle, found
            else:
                low = middle
        self.mask.add(self.original, high * delta)
        return high * delta, row | {"kl": self._held_kl()}

    def _at(
        self, delta: Float[Tensor, " weight"], *, gradient: bool = True
    ) -> tuple[dict[str, float], bool, Float[Tensor, " weight"]]:
        """Write a change, measure the targets, and take the forgetting term's gradient."""
        self.mask.add(self.original, delta)
        found, slope = self.targets.read(self.mask if gradient else None)
        reached = bool(self.targets.reached(found).all())
        return history_row(found), reached, torch.zeros_like(delta) if slope is None else slope

    def _kl_slope(self) -> Float[Tensor, " weight"]:
        """Gradient of the KL of a random batch of the seen controls."""
        seen = self.editor.seen
        assert seen is not None
        adapter, control = self.editor.adapter, seen.paragraphs
        order = torch.randperm(len(control), generator=self.editor.generator)
        batch = order[: self.editor.recipe.control_batch]
        parameters = self.mask.parameters
        total = torch.zeros(len(self.mask), device=parameters[0].device)

        def work(piece: slice) -> Tensor:
            part = seen.kl(adapter, batch[piece]).sum() / len(batch)
            return self.mask.gather(torch.autograd.grad(part, parameters))

        size = rows_that_fit_backward(adapter, control, self.editor.memory_budget)
        with adapter.preserving_state(grad=parameters):
            for _, slope in iter_batches(len(batch), size, work):
                total += slope
        return total

    def _held_kl(self) -> float:
        """KL on the held-out controls at the weights as they are, nats/token."""
        return self.editor.held.mean_kl(self.editor.adapter, self.editor.memory_budget)
