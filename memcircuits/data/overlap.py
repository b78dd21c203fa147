"""Which sets of paragraphs may be compared: those that share none.

Comparisons of memorized paragraphs with controls call `refuse_overlap` first.
"""

from __future__ import annotations

from typing import Literal

from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs


def refuse_overlap(
    memorized: Paragraphs, control: Paragraphs, *, same: Literal["paragraph", "prefix"]
) -> None:
    """Raise `InputError` if a control is one of the memorized paragraphs, or has another `bos`.

    Args:
        memorized: paragraphs that the model recites.
        control: paragraphs that they are compared with.
        same: `paragraph`, if all ids must agree: enough for measurements, because another
            continuation of a memorized prefix is not recited. `prefix`, if only the prefixes must
            agree: needed where an objective changes one continuation and keeps the other, because
            to the model both paragraphs are the same input.
    """
    memorized.check_same_bos(control, "control")
    if same == "paragraph":
        known, asked, problem = memorized.ids, control.ids, "are in the memorized set"
    else:
        known, asked = memorized.prefix, control.prefix
        problem = "have the prefix of a memorized one"
    known_ids = set(map(tuple, known.tolist()))
    n_shared = sum(tuple(ids) in known_ids for ids in asked.tolist())
    if n_shared:
        shared = f"{n_shared} of its paragraphs {problem}"
        raise InputError("control", shared, "controls must be other paragraphs")
