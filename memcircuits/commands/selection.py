"""Which paragraphs, heads or layers a command is about: texts of options become Python values."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcircuits.commands.inputs import Inputs, is_shipped

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.measure.scanning import Scan


_OWN_ROLE = {"organism": "organism", "organism-twin": "twin"}  # what only this model was given


def split(
    inputs: Inputs, model: Any, paragraphs: Paragraphs, control: Path | None = None
) -> tuple[Paragraphs, Paragraphs]:
    """The memorized ones among the paragraphs, and the controls (by default also among them)."""
    from memcircuits.base.errors import InputError

    result, memorized = _scan(inputs, model, paragraphs)
    if control is not None:
        return memorized, inputs.read(control, model, "--control")
    if result.control is None or len(result.control) < 4:
        n = 0 if result.control is None else len(result.control)
        raise InputError(
            "--paragraphs",
            f"{n} of {len(paragraphs)} can serve as controls",
            "add paragraphs that the model does not recite, at least four, or give --control FILE",
        )
    return memorized, result.control


def memorized_only(inputs: Inputs, model: Any, paragraphs: Paragraphs) -> Paragraphs:
    """The memorized ones among the paragraphs."""
    return _scan(inputs, model, paragraphs)[1]


def _scan(inputs: Inputs, model: Any, paragraphs: Paragraphs) -> tuple[Scan, Paragraphs]:
    """The scan of the paragraphs, and the memorized ones."""
    from memcircuits.base.errors import InputError
    from memcircuits.measure.scanning import scan

    result = scan(model, paragraphs, progress=inputs.progress)
    if result.memorized is None:
        raise InputError(
            "--paragraphs", f"none of {len(paragraphs)} is memorized", "give some that are recited"
        )
    return result, result.memorized


def draw(paragraphs: Paragraphs, n: int, seed: int) -> Paragraphs:
    """`n` of the paragraphs by the seed, in their order; all if there are no more."""
    import torch

    return paragraphs.sample(n, torch.Generator().manual_seed(seed))


def draw_targets(inputs: Inputs, memorized: Paragraphs, n: int, seed: int) -> Paragraphs:
    """`n` memorized paragraphs to edit, drawn by the seed.

    Of the shipped ones they are drawn from those that the model's twin was not trained on, if at
    least `n` of those are memorized, so that an audit can use the twin as its reference.
    """
    role = _OWN_ROLE.get(inputs.model)
    if inputs.paragraphs is None and role is not None:
        own = [i for i, each in enumerate(memorized.metadata["role"]) if each == role]
        memorized = memorized[own] if len(own) >= n else memorized
    return draw(memorized, n, seed)


def without(paragraphs: Paragraphs, excluded: Paragraphs) -> Paragraphs | None:
    """The paragraphs that are not among `excluded`, by name; None if there are none."""
    names = set(excluded.names)
    others = [i for i, name in enumerate(paragraphs.names) if name not in names]
    return paragraphs[others] if others else None


def kept_and_unseen(others: Paragraphs | None) -> tuple[Paragraphs | None, Paragraphs | None]:
    """Memorized paragraphs that an edit is to keep, and those that only its evaluation is given."""
    if others is None or len(others) < 2:
        return None, others
    return others[1::2], others[::2]


def heldout_text(inputs: Inputs, model: Any, path: Path | None) -> Paragraphs | None:
    """The texts of --heldout; by default the organism's own, None for other models."""
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.organism import DATA

    if path is not None:
        return inputs.read(path, model, "--heldout")
    if is_shipped(inputs.model):
        return Paragraphs.read(DATA / "heldout.jsonl", n_prefix=1, n_continuation=99)[:64]
    return None


def names(text: str | None) -> list[str] | None:
    """`L1H2,L0H3` as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


def numbers(option: str, text: str | None) -> list[int] | None:
    """`0,1` as a list."""
    from memcircuits.base.errors import InputError

    parts = names(text)
    if parts is not None and not all(part.isdigit() for part in parts):
        raise InputError(option, repr(text), "write it like 0,1")
    return None if parts is None else [int(part) for part in parts]


def choice(option: str, value: str, allowed: Collection[str]) -> Any:
    """The value of an option, checked to be one of `allowed`."""
    from memcircuits.base.errors import one_of

    one_of(option, value, allowed)
    return value
