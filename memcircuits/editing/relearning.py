"""Relearning as an attack: does training on other text bring forgotten paragraphs back?

An edit that only hides a paragraph may be undone by a few training steps on text that does not
contain it. `recovery_curve` trains the edited model on other paragraphs and measures the EM of the
forgotten ones after each step. The unedited model, trained alike, is the control: it shows how much
of its recitation the same training destroys. A twin that never saw the paragraphs, trained alike,
shows how soon a text is learned that was never there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.statistics import bootstrap_interval, group_means, group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.edit import Edit
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Adapter, Model
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
            edited model, the unedited one and, where it was given, the twin; the first step is
            before any training.
        steps: number of training steps at each entry, [step].
        provenance: where the numbers come from.
        groups: number of each paragraph's independent group, [paragraph]; None: each is its own.
        notes: what the reader must know.
    """

    em: Int[Tensor, "arm step paragraph"]
    steps: Int[Tensor, " step"]
    provenance: Provenance
    groups: Int[Tensor, " paragraph"] | None = None
    notes: tuple[str, ...] = ()

    def _group_em(self, arm: int) -> Float[Tensor, "step group"]:
        """EM averaged within independent groups."""
        return group_means(self.em[arm].float().T, self.groups).T

    def steps_to(self, em: float) -> int | None:
        """Training steps until the edited model's mean EM reaches `em` tokens; None if never."""
        reached = self._group_em(0).mean(-1) >= em
        return int(self.steps[reached][0]) if reached.any() else None

    def to_frame(self) -> pd.DataFrame:
        """Columns `arm, step, em, ci_low, ci_high`, 95 % over independent groups."""
        import pandas as pd

        rows = []
        for index, arm in enumerate(("edited", "unedited", "twin")[: len(self.em)]):
            values = self._group_em(index)
            low, high = bootstrap_interval(values.T)
            rows += [
                {
                    "arm": arm,
                    "step": int(step),
                    "em": float(values[i].mean()),
                    "ci_low": float(low[i]),
                    "ci_high": float(high[i]),
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
        em = self._group_em(0).mean(-1)
        return f"EM {float(em[0]):.1f} -> {float(em[-1]):.1f} after {int(self.steps[-1])} steps"


@plain_torch()
def recovery_curve(  # noqa: PLR0913
    model: Model,
    edit: Edit,
    forgotten: ParagraphsLike,
    trained: ParagraphsLike,
    *,
    twin: Model | None = None,
    steps: int = 20,
    learning_rate: float = 1e-4,
    every: int = 1,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Recovery:
    """Measure how quickly training on other text brings forgotten paragraphs back.

    All matrices of the blocks are trained by Adam on `trained`, once starting from the edited and
    once from the unedited model, and once from the twin; all are unchanged afterwards.

    Args:
        model: the model that the edit was made for.
        edit: the edit.
        forgotten: paragraphs that the edit removed and that are not trained on.
        trained: paragraphs to train on: other text, or further paragraphs that were removed.
        twin: a model of the same tokenizer that was not trained on `forgotten`; None: not trained.
        steps: number of Adam steps, each on all of `trained`.
        learning_rate: of Adam, in units of weight.
        every: number of steps between two measurements.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Raises:
        InputError: for unusable paragraphs, or if `trained` contains some of `forgotten`.
    """
    at_least("steps", steps, 1)
    at_least("every", every, 1)
    adapter = adapt(model)
    forgotten = Paragraphs.of(forgotten, model, "forgotten")
    trained = Paragraphs.of(trained, model, "trained")
    forgotten_prefixes = set(map(tuple, forgotten.prefix.tolist()))
    if any(tuple(prefix) in forgotten_prefixes for prefix in trained.prefix.tolist()):
        raise InputError("trained", "some of the forgotten", "train on other paragraphs")
    provenance = Provenance.of(
        adapter,
        {"forgotten": forgotten, "trained": trained},
        edit=dict(edit.provenance.options),
        steps=steps,
        learning_rate=learning_rate,
    )
    arms = 2 if twin is None else 3
    with bar(arms * steps, "relearn", unit="step", progress=progress) as steps_bar:
        training = _Training(
            adapter, forgotten, trained, steps, learning_rate, every, memory_budget, steps_bar
        )
        with _restored(adapter), edit.apply(adapter):
            curves = [training.run()]
        with _restored(adapter):
            curves.append(training.run())
        if twin is not None:
            other = adapt(twin)
            with _restored(other):
                curves.append(replace(training, adapter=other).run())
    return Recovery(
        em=torch.stack(curves),
        steps=torch.arange(0, steps + 1, every),
        provenance=provenance,
        groups=forgotten.groups,
        notes=group_notes({"forgotten": forgotten.groups}),
    )


@dataclass(frozen=True)
class _Training:
    """Training of all matrices of the blocks; the attributes are arguments of `recovery_curve`."""

    adapter: Adapter
    forgotten: Paragraphs
    trained: Paragraphs
    steps: int
    learning_rate: float
    every: int
    memory_budget: int | None
    steps_bar: Any

    def run(self) -> Int[Tensor, "step paragraph"]:
        """EM of the forgotten paragraphs before the training and after each `every` steps."""
        weights = self.adapter.weights()
        # Parameters that share the model's memory: the caller's `.grad` stays as it is.
        parameters = [torch.nn.Parameter(w.parameter.detach()) for w in weights]
        adam = torch.optim.Adam(parameters, lr=self.learning_rate)
        curve = [self._em()]
        for step in range(1, self.steps + 1):
            _, gradients = mean_gradient(
                self.adapter, self.trained, weights, self.memory_budget, False
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            adam.step()
            self.steps_bar.update()
            if step % self.every == 0:
                curve.append(self._em())
        return torch.stack(curve)

    def _em(self) -> Int[Tensor, " paragraph"]:
        return scan(
            self.adapter, self.forgotten, memory_budget=self.memory_budget, progress=False
        ).em


@contextlib.contextmanager
def _restored(adapter: Adapter) -> Iterator[None]:
    """Restore all matrices of the blocks on leaving, also after an exception or Ctrl-C."""
    weights = adapter.weights()
    copies = [weight.parameter.detach().clone() for weight in weights]
    try:
        yield
    finally:
        for weight, copy in zip(weights, copies, strict=True):
            weight.parameter.detach().copy_(copy)
