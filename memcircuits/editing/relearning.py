"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.progress import bar
from memcircuits.core.statistics import bootstrap_interval
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.edit import Edit
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import scan
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Recovery(Result, kind="recovery"):
    """Recitation while the model is trained on other text.

    Attributes:
        em: EM of the paragraphs not trained on, tokens, [arm, step, paragraph]; the arms are the
            edited and the unedited model, the first step is before any training.
        steps: number of training steps at each entry, [step].
        provenance: where the numbers come from.
    """

    em: Int[Tensor, "arm step paragraph"]
    steps: Int[Tensor, " step"]
    provenance: Provenance

    def steps_to(self, em: float) -> int | None:
        """Training steps until the edited model's mean EM reaches `em` tokens; None: never."""
        reached = self.em[0].float().mean(-1) >= em
        return int(self.steps[reached][0]) if reached.any() else None

    def to_frame(self) -> pd.DataFrame:
        """Columns `arm, step, em, ci_low, ci_high`, 95 % over paragraphs."""
        import pandas as pd

        rows = []
        for arm, values in zip(("edited", "unedited"), self.em, strict=True):
            bounds = bootstrap_interval(values.T)
            rows += [
                {
                    "arm": arm,
                    "step": int(step),
                    "em": float(values[i].float().mean()),
                    "ci_low": float(bounds[0, i]),
                    "ci_high": float(bounds[1, i]),
                }
                for i, step in enumerate(self.steps)
            ]
        return pd.DataFrame(rows)

    def figure(self) -> Any:
        """EM against training steps, edited beside unedited model (plotly)."""
        from memcircuits.display import figures

        names = {"arm": "set", "ci_low": "em_low", "ci_high": "em_high"}
        return figures.curves(
            self.to_frame().rename(columns=names),
            "step",
            {"em": "exact match (tokens)"},
            title="Relearning on other text",
            x_label="training step",
        )

    def __str__(self) -> str:
        em = self.em[0].float().mean(-1)
        return f"EM {float(em[0]):.1f} -> {float(em[-1]):.1f} after {int(self.steps[-1])} steps"


def recovery_curve(
    model: Any,
    edit: Edit,
    forgotten: Any,
    trained: Any,
    *,
    steps: int = 20,
    learning_rate: float = 1e-4,
    every: int = 1,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Recovery:
    """How quickly does relearning bring the forgotten back?

    All matrices of the blocks are trained by Adam on `trained`, once starting from the edited and
    once from the unedited model; afterwards the model is as before.

    Args:
        model: the model that the edit was made for.
        edit: the edit.
        forgotten: paragraphs that the edit removed and that are not trained on.
        trained: paragraphs to train on: other text, or the rest of what was removed.
        steps: Adam steps, each on all of `trained`.
        learning_rate: of Adam, in units of weight.
        every: measure after every so many steps.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Raises:
        InputError: for unusable paragraphs, or if `trained` contains some of `forgotten`.
    """
    at_least("steps", steps, 1)
    at_least("every", every, 1)
    adapter = adapt(model)
    forgotten = Paragraphs.of(forgotten, model, "forgotten")
    trained = Paragraphs.of(trained, model, "trained")
    known = set(map(tuple, forgotten.prefix.tolist()))
    if any(tuple(row) in known for row in trained.prefix.tolist()):
        raise InputError("trained", "some of the forgotten", "train on other paragraphs")
    weights = adapter.weights()
    provenance = Provenance.of(
        adapter,
        {"forgotten": forgotten, "trained": trained},
        edit=dict(edit.provenance.options),
        steps=steps,
        learning_rate=learning_rate,
    )

    def em() -> Tensor:
        return scan(model, forgotten, memory_budget=memory_budget, progress=False).em

    def train() -> Tensor:
        # Parameters of our own on the model's memory: the caller's `.grad` stays as it is.
        twins = [torch.nn.Parameter(w.parameter.detach()) for w in weights]
        adam = torch.optim.Adam(twins, lr=learning_rate)
        curve = [em()]
        for step in range(1, steps + 1):
            _, gradients = mean_gradient(adapter, trained, weights, memory_budget, False)
            for twin, gradient in zip(twins, gradients, strict=True):
                twin.grad = gradient.to(twin.dtype)
            adam.step()
            shown.update()
            if step % every == 0:
                curve.append(em())
        return torch.stack(curve)

    with bar(2 * steps, "relearn", unit="step", progress=progress) as shown:
        curves = []
        for edited in (True, False):
            copies = [w.parameter.detach().clone() for w in weights]
            try:
                if edited:
                    with edit.apply(model):
                        curves.append(train())
                else:
                    curves.append(train())
            finally:
                for weight, copy in zip(weights, copies, strict=True):
                    weight.parameter.detach().copy_(copy)
    return Recovery(
        em=torch.stack(curves),
        steps=torch.arange(0, steps + 1, every),
        provenance=provenance,
    )
