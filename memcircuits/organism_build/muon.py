"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Move all singular values near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: [matrix, row, column] with no more rows than columns.
        steps: Iterations.

    Returns:
        Matrices of the same shape.
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices inside the layers.

    Matrices of one shape are stacked and treated together. With only a few million tokens to learn
    from, what counts is the progress made in each step.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": group} for group in shapes.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
            stacked = torch.stack(updates)
            rows, columns = stacked.shape[1:]
            tall = rows > columns
            update = orthogonalize(stacked.mT if tall else stacked)
            update = update.mT if tall else update
            scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=scale)
