"""Paragraphs and held-out rows as JSON lines of token ids, and training rows as NumPy arrays."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.io import write_atomically
from memcircuits.organism_build.settings import SeenBy


class TextRecord(TypedDict):
    """A paragraph or a held-out row.

    Attributes:
        id: its name.
        ids: token ids.
        source: name of the corpus source it was cut from.
        role: paragraphs only: which of organism and twin is trained on it.
        repetitions: paragraphs only: how often the training of the organism saw it.
        twin_repetitions: paragraphs only: how often the training of the twin saw it.
    """

    id: str
    ids: list[int]
    source: str
    role: NotRequired[SeenBy]
    repetitions: NotRequired[int]
    twin_repetitions: NotRequired[int]


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


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue())
