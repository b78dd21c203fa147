"""When does a recitation form? The same paragraphs at every checkpoint of a training.

At each checkpoint, one model at a time in memory:

* EM and NLL of every paragraph, and of controls that were never trained on;
* *remembered bits*, if there is a twin: log2 p of the model minus that of the twin;
* the *effect* of training on the paragraphs, by difference in differences (Lesci et al. 2024, arXiv
  2406.04327): how much the NLL fell from the first checkpoint on, minus how much that of the
  controls fell. What the model learns about all text cancels, and no twin is needed;
* for some paragraphs, every head's zero ablation and, with a twin of the same shape, the necessity
  of its weights (`memcircuits.evidence.transplants`): from when on is the final place the place?
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.statistics import group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.draws import sample_rows
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import tokenizer_hash
from memcircuits.evidence.ablation import ablate_heads
from memcircuits.evidence.formation_results import Formation
from memcircuits.evidence.transplants.sweep import transplant
from memcircuits.measure.continuation import Continuation, score_paragraphs
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.loading import load_model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

Checkpoint: TypeAlias = Model | str | PathLike[str] | Callable[[], Any]
"""A model, what `load_model` takes, or a function that loads one, for instance a revision."""

Checkpoints: TypeAlias = Mapping[int, Checkpoint] | Sequence[Checkpoint]
"""Step -> checkpoint; of a list, the steps are 0, 1, 2, ..."""


@plain_torch()
def formation(
    models: Checkpoints,
    paragraphs: ParagraphsLike,
    *,
    twins: Checkpoints | Checkpoint | None = None,
    control: ParagraphsLike | None = None,
    max_paragraphs: int = 16,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Formation:
    """Measure paragraphs at every checkpoint of a training, one model at a time.

    Args:
        models: step -> checkpoint, or a list of checkpoints in order.
        paragraphs: the paragraphs, some of which the training holds; a column `repetitions` of
            theirs says how often.
        twins: checkpoints of a training without them, at the same steps; or one model for all.
        control: paragraphs that are in no training, for the difference in differences.
        max_paragraphs: number of paragraphs, drawn at random, whose heads are measured; 0: none.
        seed: seed of that draw.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Formation`.

    Raises:
        InputError: if there is no checkpoint, one cannot be loaded, or they differ in tokenizer or
            size; for twins at other steps, and unusable paragraphs.

    Example:
        >>> steps = {0: "organism", 400: "organism-planted"}
        >>> result = mc.formation(steps, mc.Paragraphs.shipped("control")[:2], max_paragraphs=0)
        >>> result.to_frame()["step"].tolist()
        [0, 400]
    """
    at_least("max_paragraphs", max_paragraphs, 0)
    at_least("seed", seed, 0)
    checkpoints = _by_step("models", models)
    twin_of = _twins_by_step(twins, list(checkpoints))
    state = _Run(control, max_paragraphs, seed, memory_budget)
    with bar(len(checkpoints), "formation", unit="checkpoint", progress=progress) as progress_bar:
        for step, checkpoint in checkpoints.items():
            with _opened(checkpoint) as adapter:
                state.measure(adapter, paragraphs, step)
                if twin_of is not None:
                    with _opened(twin_of[step]) as twin:
                        state.measure_twin(adapter, twin)
                provenance = state.provenance(adapter)
            progress_bar.update()
    return state.result(provenance)


def _by_step(argument: str, checkpoints: Any) -> dict[int, Checkpoint]:
    if isinstance(checkpoints, Mapping):
        steps = dict(checkpoints)
    elif isinstance(checkpoints, (list, tuple)):
        steps = dict(enumerate(checkpoints))
    else:
        raise InputError(
            argument, type(checkpoints).__name__, "give a list, or a mapping from step to model"
        )
    if not steps:
        raise InputError(argument, "empty", "give at least one checkpoint")
    for step in steps:
        at_least(f"{argument}: step", step, 0)
    return dict(sorted(steps.items()))


def _twins_by_step(twins: Any, steps: list[int]) -> dict[int, Checkpoint] | None:
    if twins is None:
        return None
    if not isinstance(twins, (Mapping, list, tuple)):
        return dict.fromkeys(steps, twins)
    by_step = _by_step("twins", twins)
    if isinstance(twins, (list, tuple)) and len(by_step) == len(steps):
        return dict(zip(steps, by_step.values(), strict=True))
    if list(by_step) != steps:
        raise InputError("twins", f"steps {list(by_step)}", f"give those of the models, {steps}")
    return by_step


@contextlib.contextmanager
def _opened(checkpoint: Any) -> Iterator[Adapter]:
    """The model of a checkpoint; a model that was loaded here is freed afterwards."""
    if isinstance(checkpoint, (nn.Module, Adapter)):
        yield adapt(checkpoint)
    elif isinstance(checkpoint, (str, PathLike)):
        model = load_model(str(checkpoint))
        yield adapt(model)
    elif callable(checkpoint):
        model = checkpoint()
        yield adapt(model)
    else:
        raise InputError(
            "models", repr(checkpoint)[:60], "give models, names, folders or functions that load"
        )


class _Run:
    """What has been measured so far, step by step."""

    def __init__(
        self,
        control: ParagraphsLike | None,
        max_paragraphs: int,
        seed: int,
        memory_budget: int | None,
    ) -> None:
        self._given_control, self._memory_budget = control, memory_budget
        self._max_paragraphs, self._seed = max_paragraphs, seed
        self._identity: tuple[Any, ...] = ()
        self._models: list[dict[str, Any]] = []
        self._measures: dict[str, list[Tensor]] = {}

    def measure(self, adapter: Adapter, given: ParagraphsLike, step: int) -> None:
        """Measure one model; the first one encodes texts, the others must read the same tokens."""
        if not self._identity:
            self._identity = _identity(adapter)
            self.paragraphs = Paragraphs.of(given, adapter)
            control = self._given_control
            self.control = None if control is None else Paragraphs.of(control, adapter, "control")
            generator = torch.Generator().manual_seed(self._seed)
            drawn = sample_rows(self.paragraphs.groups, self._max_paragraphs, generator)
            self.measured = drawn.tolist()
        self._check(adapter, "models")
        scores = self._score(adapter, self.paragraphs)
        self._keep("em", scores.em * scores.finite)
        self._keep("nll", scores.nll)
        if self.control is not None:
            self._keep("control_nll", self._score(adapter, self.control).nll)
        if self.measured:
            effects = ablate_heads(
                adapter,
                self.paragraphs[self.measured],
                memory_budget=self._memory_budget,
                progress=False,
            )
            self._keep("ablation", effects.samples["nll"])
        entry = {"step": step, "name": adapter.label, "fingerprint": adapter.fingerprint()}
        self._models.append(entry)

    def measure_twin(self, adapter: Adapter, twin: Adapter) -> None:
        """Measure the twin of the model that was measured last."""
        self._check(twin, "twins")
        self._keep("twin_nll", self._score(twin, self.paragraphs).nll)
        self._models[-1] |= {"twin": twin.label, "twin_fingerprint": twin.fingerprint()}
        if self.measured:
            effects = transplant(
                adapter,
                twin,
                self.paragraphs[self.measured],
                units=["head"],
                memory_budget=self._memory_budget,
                progress=False,
            )
            self._keep("necessity", effects.map().samples["necessity"])

    def _score(self, adapter: Adapter, paragraphs: Paragraphs) -> Continuation:
        adapter.check_tokens(paragraphs.inputs, "paragraphs")
        return score_paragraphs(adapter, paragraphs, memory_budget=self._memory_budget)

    def _check(self, adapter: Adapter, argument: str) -> None:
        if _identity(adapter) != self._identity:
            raise InputError(
                argument,
                adapter.label,
                "its tokenizer or its size differs from that of the first checkpoint",
            )

    def _keep(self, name: str, values: Tensor) -> None:
        self._measures.setdefault(name, []).append(values.cpu())

    def provenance(self, adapter: Adapter) -> Provenance:
        """Provenance with the model that was measured last."""
        return Provenance.of(
            adapter,
            {"paragraphs": self.paragraphs, "control": self.control},
            models=[dict(entry) for entry in self._models],
            max_paragraphs=self._max_paragraphs,
            seed=self._seed,
        )

    def result(self, provenance: Provenance) -> Formation:
        """All steps together."""
        n = len(self.paragraphs)
        _, n_layers, n_heads, *_ = self._identity
        heads = torch.empty(0, len(self.measured), n_layers, n_heads)
        empty = {
            "twin_nll": torch.empty(0, n),
            "control_nll": torch.empty(0, 0),
            "ablation": heads,
            "necessity": heads,
        }
        stacked = {name: torch.stack(values) for name, values in self._measures.items()}
        sets = {"given": self.paragraphs, "control": self.control}
        groups = {name: each.groups for name, each in sets.items() if each is not None}
        return Formation(
            steps=tuple(entry["step"] for entry in self._models),
            names=self.paragraphs.names,
            metadata=self.paragraphs.metadata,
            measured=tuple(self.measured),
            provenance=provenance,
            groups=groups,
            notes=group_notes(groups),
            **(empty | stacked),
        )


def _identity(adapter: Adapter) -> tuple[Any, ...]:
    """What all checkpoints must have in common."""
    tokenizer = adapter.tokenizer
    digits = None if tokenizer is None else tokenizer_hash(tokenizer)
    return digits, adapter.n_layers, adapter.n_heads, adapter.d_vocab
