"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcircuits.commands import common as c

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs


def heldout_text(source: c.Source, model: Any, path: Path | None) -> Paragraphs | None:
    """The texts of --heldout, for the organism its own."""
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.organism import DATA

    if path is None and c.is_shipped(source.model):
        return Paragraphs.read(DATA / "heldout.jsonl", n_prefix=1, n_continuation=99)[:64]
    return None if path is None else source.read(path, model)


def split(
    source: c.Source, model: Any, given: Paragraphs, control: Path | None = None
) -> tuple[Paragraphs, Paragraphs]:
    """The memorized among the given paragraphs, and the controls."""
    from memcircuits.core.errors import InputError
    from memcircuits.measure.scanning import scan

    found = scan(model, given, progress=not source.quiet)
    if found.memorized is None:
        raise InputError(
            "--paragraphs", f"none of {len(given)} is memorized", "give some that are recited"
        )
    if control is not None:
        return found.memorized, source.read(control, model)
    if found.control is None or len(found.control) < 4:
        raise InputError(
            "--control", "not given", "fewer than four of the paragraphs can serve as controls"
        )
    return found.memorized, found.control


def draw(paragraphs: Paragraphs, n: int, seed: int) -> Paragraphs:
    """`n` of the paragraphs by the seed, in their order; all if there are no more."""
    import torch

    return paragraphs.sample(n, torch.Generator().manual_seed(seed))


def without(paragraphs: Paragraphs, some: Paragraphs) -> Paragraphs | None:
    """The others."""
    taken = set(some.names)
    left = [i for i, name in enumerate(paragraphs.names) if name not in taken]
    return paragraphs[left] if left else None


def names(text: str | None) -> list[str] | None:
    """`L1H2,L0H3` as a list."""
    return None if text is None else [part.strip() for part in text.split(",")]


def numbers(option: str, text: str | None) -> list[int] | None:
    """`0,1` as a list."""
    from memcircuits.core.errors import InputError

    parts = names(text)
    if parts is not None and not all(part.isdigit() for part in parts):
        raise InputError(option, repr(text), "write it like 0,1")
    return None if parts is None else [int(part) for part in parts]
