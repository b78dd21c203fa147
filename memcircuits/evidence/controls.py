"""Which texts are controls, and what they are: the composition that a ranking reports.

Controls among the given paragraphs have a low EM. That alone lets in paragraphs that the model
half knows: EM counts the tokens before the first mismatch, and one slip early on hides the rest.
So those of which at least half of all tokens are greedy are left out (`HALF_MEMORIZED`), and where
repetitions in training are known, those that were trained on, unless too few remain.

A text of which the model is unsure has little to lose, whatever is ablated. Controls of which it is
as sure as of a recitation are its own greedy continuations of the controls' prefixes
(`own_continuations`): confident text that is no recitation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.recitation_kinds import is_repeating
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Model

ControlText: TypeAlias = Literal["true", "own"]
"""What follows a control's prefix: its true continuation, or the model's own greedy one."""


@dataclass(frozen=True)
class ControlChoice:
    """Which texts memorized paragraphs are compared with.

    Attributes:
        given: the controls; None for those among the paragraphs that the model does not know.
        text: see `ControlText`.
        match_nll: whether those are taken whose NLL is nearest to the mean of the memorized
            paragraphs; given ones that are half memorized are then left out.
    """

    given: ParagraphsLike | None = None
    text: ControlText = "true"
    match_nll: bool = False


HALF_MEMORIZED = 0.5
"""Share of greedy tokens from which a paragraph is no control."""


def own_continuations(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Paragraphs:
    """Text of which the model is sure: its own continuations of the given prefixes.

    Those that repeat themselves (`memcircuits.evidence.recitation_kinds`) and those that are the
    true continuation are left out.

    Args:
        model: the model.
        paragraphs: paragraphs that it does not recite.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Raises:
        InputError: if fewer than two remain.

    Example:
        >>> own = own_continuations(model, control, progress=False)
        >>> mc.scan(model, own, progress=False).is_memorized.all()
        tensor(True)
    """
    paragraphs = Paragraphs.of(paragraphs, model)
    own = greedy_continuations(model, paragraphs, memory_budget=memory_budget, progress=progress)
    is_other = (own.ids != paragraphs.ids).any(1)
    varied = [not is_repeating(ids) for ids in own.continuation.tolist()]
    chosen = is_other & torch.tensor(varied)
    if chosen.sum() < 2:
        raise InputError(
            "control_text",
            f"{int(chosen.sum())} of {len(own)} own continuations neither repeat themselves nor "
            "are the text",
            "give more controls, or control_text='true'",
        )
    return own[chosen]


def unknown_to_the_model(scan_result: Scan) -> Bool[Tensor, " paragraph"]:
    """Which scanned paragraphs can be controls."""
    chosen = scan_result.is_control & (scan_result.loose_match < HALF_MEMORIZED)
    trained = repetitions(scan_result.paragraphs)
    if trained is not None and (chosen & (trained == 0)).sum() >= 2:
        chosen = chosen & (trained == 0)
    return chosen


def repetitions(paragraphs: Paragraphs) -> Float[Tensor, " paragraph"] | None:
    """How often each paragraph was trained on; None where that is not known."""
    column = next((name for name in REPETITION_COLUMNS if name in paragraphs.metadata), None)
    if column is None:
        return None
    values = [_number(value) for value in paragraphs.metadata[column]]
    return None if None in values else torch.tensor(values)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def composition(scan_result: Scan, rows: Int[Tensor, " row"], control_text: ControlText) -> str:
    """One sentence on what the measured controls are, rows of a scan."""
    nll, em = scan_result.nll[rows], scan_result.em[rows].float()
    text = "the model's own continuations" if control_text == "own" else "texts"
    sentence = (
        f"Controls: {len(rows)} {text}, NLL {float(nll.mean()):.2f} nats/token "
        f"({float(nll.min()):.2f} to {float(nll.max()):.2f}), mean EM {float(em.mean()):.1f}, "
        f"{100 * float(scan_result.loose_match[rows].mean()):.0f} % of their tokens greedy"
    )
    trained = repetitions(scan_result.paragraphs[rows])
    if trained is None:
        return sentence + "; how often they were trained on is not known."
    n_trained = int((trained > 0).sum())
    if not n_trained:
        return sentence + "; none was trained on."
    return (
        f"{sentence}; {n_trained} were trained on, up to {int(trained.max())} times: their effects "
        "are part memory."
    )
