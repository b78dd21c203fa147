"""Paragraphs and held-out rows as files: JSON lines, one record of token ids per line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.io import write_atomically


class TextRecord(TypedDict):
    """A paragraph or a held-out row.

    Attributes:
        id: its name.
        ids: token ids.
        source: name of the corpus source it was cut from.
        repetitions: paragraphs only: how often training saw it, 0 for controls.
        role: paragraphs only: `planted` or `control`.
    """

    id: str
    ids: list[int]
    source: str
    repetitions: NotRequired[int]
    role: NotRequired[str]


def write_records(path: Path, records: Sequence[TextRecord]) -> None:
    """Write one record per line."""
    lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    write_atomically(path, "".join(lines))


def read_records(path: Path) -> list[TextRecord]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_rows(path: Path) -> Int[Tensor, "batch pos"]:
    """The token ids of all records of a file, which have the same length."""
    return torch.tensor([record["ids"] for record in read_records(path)])
