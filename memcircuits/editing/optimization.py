"""The optimiser loop of `unlearn`, `edit` and `plant` for one change of the masked weights.

1. A stepper holds the change d, one number per masked weight. Nothing else can change: each step
   writes `original + d` into the masked weights.
2. The objective measures the model with this change: its loss and gradient, and the KL on controls
   that the objective does not see.
3. A change over the KL budget is rejected. `TrustRegion` then tries a shorter step from the last
   accepted change; `AdamSteps` cannot, and the search ends.
4. A change that is not rejected is kept if the objective prefers it to the best one so far.
5. The search ends when the objective is reached; otherwise the stepper proposes the next change.

The caller restores the weights (`Mask.restored`), also after an exception or Ctrl-C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.progress import bar
from memcircuits.editing.curvature import Quadratic
from memcircuits.editing.edit import Stopped
from memcircuits.editing.masks import Mask
from memcircuits.editing.objective import Evaluation, Objective
from memcircuits.editing.unlearning_objective import EditObjective

SHORTEST = 0.1  # of the first step's length: a rejected step that is shorter ends the search

Refine = Callable[[Float[Tensor, " weight"], Evaluation], tuple[Tensor, Evaluation]]


class Stepper(Protocol):
    """Proposes changes."""

    @property
    def change(self) -> Float[Tensor, " weight"]:
        """The change to try next, in units of weight."""

    @property
    def size_option(self) -> tuple[str, float]:
        """Name and value of the option that decides the length of a step."""

    def propose(self, gradient: Float[Tensor, " weight"], loss: float) -> None:
        """Move `change` on from an accepted one with this gradient and loss."""

    def reject(self) -> bool:
        """Move `change` back towards the last accepted one; False if no shorter step is tried."""


class TrustRegion:
    """Natural-gradient steps whose predicted KL is `step_kl`.

    The length is halved after a step that increased the loss, and after a rejected one.

    Args:
        cost: the quadratic model of the KL.
        step_kl: KL that the model predicts for a step, nats/token.
    """

    def __init__(self, cost: Quadratic, step_kl: float) -> None:
        self.cost = cost
        self.size_option = ("step_kl", step_kl)
        self.change = torch.zeros_like(cost.diagonal)
        self.accepted = self.change
        self.direction = torch.zeros_like(self.change)
        self.length = self.first_length = step_kl**0.5
        self.loss = math.inf

    def propose(self, gradient: Float[Tensor, " weight"], loss: float) -> None:
        """Step along F^-1 g."""
        if loss > self.loss:
            self.length /= 2
        natural = self.cost.natural_gradient(gradient)
        self.direction = self.cost.kl(natural) ** -0.5 * natural
        self.accepted, self.loss = self.change, loss
        self.change = self.accepted - self.length * self.direction

    def reject(self) -> bool:
        """Halve the step, unless it is shorter than `SHORTEST` of the first one."""
        if self.length < SHORTEST * self.first_length:
            return False
        self.length /= 2
        self.change = self.accepted - self.length * self.direction
        return True


class AdamSteps:
    """Steps of Adam.

    Args:
        scale: unit in which each weight's change is counted.
        learning_rate: of Adam, in these units.
        betas: of Adam.
        decay_steps: number of steps in which the learning rate falls to 0 as a cosine; None: it is
            constant.
        start: the change to start from; None: none.
    """

    def __init__(
        self,
        scale: Float[Tensor, " weight"],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        decay_steps: int | None = None,
        start: Float[Tensor, " weight"] | None = None,
    ) -> None:
        self.scale = scale
        first = torch.zeros_like(scale) if start is None else start / scale
        self.scaled_change = torch.nn.Parameter(first)
        self._optimize([self.scaled_change], learning_rate, betas, decay_steps)

    def _optimize(
        self,
        coordinates: Sequence[torch.nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float],
        decay_steps: int | None,
    ) -> None:
        """Set Adam up for the numbers that the change is made of."""
        self.size_option = ("learning_rate", learning_rate)
        self.adam = torch.optim.Adam(coordinates, lr=learning_rate, betas=betas)
        self.schedule = (
            None
            if decay_steps is None
            else torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, decay_steps)
        )

    @property
    def change(self) -> Float[Tensor, " weight"]:
        """The change, in units of weight."""
        return self.scaled_change.detach() * self.scale

    def propose(self, gradient: Float[Tensor, " weight"], loss: float) -> None:
        """Step of Adam; the loss has no influence."""
        self.scaled_change.grad = gradient * self.scale
        self._step()

    def _step(self) -> None:
        """Move the coordinates along their gradients."""
        self.adam.step()
        if self.schedule is not None:
            self.schedule.step()

    def reject(self) -> bool:
        """A step of Adam has no shorter version."""
        return False


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        change: the change kept, None if none was acceptable.
        history: measure -> value at each step; a last row may be that of the refined change.
        kept: row of `change` in the history, 0 without one.
        stopped: why the steps ended: `em` (reached), `kl` (budget) or `steps`.
    """

    change: Float[Tensor, " weight"] | None
    history: dict[str, Float[Tensor, " step"]]
    kept: int
    stopped: Stopped

    @property
    def report(self) -> dict[str, Any]:
        """The fields of `Edit` that say how the change was found."""
        return {"history": self.history, "kept": self.kept, "stopped": self.stopped}


def search(
    objective: Objective,
    stepper: Stepper,
    mask: Mask,
    original: list[Tensor],
    *,
    steps: int,
    label: str,
    refine: Refine | None = None,
    progress: bool = True,
) -> SearchResult:
    """Minimise an objective in the weights of a mask. The last change tried stays in the model.

    Args:
        objective: what to minimise.
        stepper: how to step.
        mask: the weights.
        original: their values without any change.
        steps: maximum number of steps.
        label: text beside the progress bar.
        refine: improves a change that reaches the objective, before it is judged.
        progress: show a bar on stderr.

    Raises:
        InputError: if a loss is not finite; the message names the step.
    """
    rows: list[dict[str, float]] = []
    best: tuple[Tensor, Evaluation, int] | None = None
    stopped: Stopped = "steps"
    with bar(steps, label, unit="step", progress=progress) as steps_bar:
        for step in range(steps + 1):
            # Write the proposed change into the model, and measure it.
            change, last = stepper.change, step == steps
            mask.add(original, change)
            evaluation = objective.evaluate(mask, last=last)
            if not evaluation.finite:
                raise _not_finite(stepper, step)
            rows.append(dict(evaluation.row))
            if refine is not None and evaluation.reached and step:
                change, evaluation = refine(change, evaluation)
                rows.append(dict(evaluation.row))
            # Keep it, or go back.
            if evaluation.rejected:
                if last or not stepper.reject():
                    stopped = "kl"
                    break
                steps_bar.update()
                continue
            if objective.prefers(evaluation, best[1] if best else None):
                best = change, evaluation, len(rows) - 1
            if evaluation.done:
                stopped = "em"
                break
            # Propose the next one.
            if not last:
                stepper.propose(objective.full_gradient(mask, evaluation), evaluation.loss)
                steps_bar.update()
    history = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    if best is None:
        return SearchResult(None, history, 0, stopped)
    return SearchResult(best[0], history, best[2], stopped)


def scale_back(objective: EditObjective, mask: Mask, original: list[Tensor]) -> Refine:
    """For `search`: find the smallest multiple of a change, to 1/64, that reaches the targets."""

    def refine(change: Tensor, evaluation: Evaluation) -> tuple[Tensor, Evaluation]:
        low, high = 0.0, 1.0
        while high - low > 1 / 64:
            middle = (low + high) / 2
            mask.add(original, middle * change)
            scaled = objective.evaluate(mask, last=False, gradient=False)
            if scaled.reached:
                high, evaluation = middle, scaled
            else:
                low = middle
        mask.add(original, high * change)
        kl = objective.held_out_kl()
        row = {**evaluation.row, "kl": kl}
        return high * change, replace(evaluation, row=row, rejected=kl > objective.kl_budget)

    return refine


def _not_finite(stepper: Stepper, step: int) -> InputError:
    name, value = stepper.size_option
    return InputError(
        name,
        value,
        f"the loss was not finite at step {step}; the model is restored; use a smaller value",
    )
