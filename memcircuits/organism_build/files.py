"""TODO."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from memcircuits.organism_build.settings import Record


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_via(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a temporary neighbour of ``path``, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Sequence[Record]) -> None:
    write_atomic(path, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows))


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_rows(path: Path) -> torch.Tensor:
    return torch.tensor([record["ids"] for record in read_lines(path)])
