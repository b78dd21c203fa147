"""Two sets of paragraphs that an analysis compares: memorized ones and controls.

They are comparable if they have the same lengths and the same tokens in front, share no paragraph,
and the model's numbers on them are finite.
"""

from __future__ import annotations

from memcircuits.base.errors import InputError
from memcircuits.data.overlap import refuse_overlap
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter


def comparable_sets(
    adapter: Adapter,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    memory_budget: int | None,
) -> tuple[Paragraphs, Paragraphs]:
    """Both sets, each without the paragraphs on which the model's numbers are not finite.

    Raises:
        InputError: for ids that the model does not have, sets of other lengths, a control that is
            among the memorized paragraphs, or a set without finite numbers.
    """
    first = Paragraphs.of(memorized, adapter.model, "memorized")
    second = Paragraphs.of(control, adapter.model, "control")
    for name, paragraphs in (("memorized", first), ("control", second)):
        adapter.check_tokens(paragraphs.inputs, name)
    if (first.n_prefix, first.n_continuation) != (second.n_prefix, second.n_continuation):
        raise InputError(
            "control",
            f"{second.n_prefix} + {second.n_continuation} tokens",
            f"give {first.n_prefix} + {first.n_continuation}, as many as the memorized ones have",
        )
    refuse_overlap(first, second, same="paragraph")
    return (
        first[has_finite_scores(adapter, first, "memorized", memory_budget)],
        second[has_finite_scores(adapter, second, "control", memory_budget)],
    )
