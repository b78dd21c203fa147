"""Malformed inputs: how many of each kind, how they are made, and what may come of them.

All draws are seeded, so a failure can be repeated; the message of a failed assertion names the
input. The environment variable FUZZ multiplies the numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memcircuits.base.errors import InputError

TIMES = int(os.environ.get("FUZZ", "1"))
_COUNTS = {
    "spoiled files": 60,  # for each of the formats
    "odd records": 130,
    "spoiled results": 40,  # for each of the kinds
    "scan folders": 50,
    "trials": 40,
    "model folders": 150,
    "gguf files": 60,
    "command lines": 200,
    "odd arguments": 200,
}
COUNTS = {kind: TIMES * n for kind, n in _COUNTS.items()}
"""How many malformed inputs of each kind are made, at least."""

TRIED: Counter[str] = Counter()
"""How many were made in this process."""

VALUES: tuple[Any, ...] = (None, True, -1, 0, 3, 1.5, "", "x", [], {}, [1, 2], {"a": None}, "llama")
"""What is put in the place of a value of JSON."""


@contextlib.contextmanager
def only_input_errors(kind: str, malformed: object) -> Iterator[None]:
    """Anything but a clear error is a failure that says what the input was."""
    TRIED[kind] += 1
    try:
        yield
    except InputError:
        return
    except Exception as error:
        message = f"{type(error).__name__}: {error}\ninput: {malformed!r}"
        raise AssertionError(message[:2000]) from error


def spoil(raw: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, put in, doubled, swapped, or all of them random."""
    at = draw.randrange(len(raw) + 1)
    to = min(len(raw), at + draw.randrange(1, 40))
    noise = draw.randbytes(draw.randrange(1, 20))
    signs = "".join(draw.choices(string.punctuation + "\0\n\r\t\ufeff\u2028é😀0", k=3)).encode()
    return draw.choice(
        (
            lambda: raw[:at],
            lambda: raw[at:],
            lambda: raw[:at] + raw[to:],
            lambda: raw[:at] + noise + raw[at:],
            lambda: raw[:at] + signs + raw[at:],
            lambda: raw[:at] + noise + raw[at + len(noise) :],
            lambda: raw[:to] + raw[at:],
            lambda: bytes(b ^ (1 << draw.randrange(8)) if draw.random() < 0.02 else b for b in raw),
            lambda: draw.randbytes(len(raw) % 200),
            lambda: noise * 50,
        )
    )()


def odd_value(raw: bytes, draw: random.Random) -> bytes:
    """JSON with one odd value in place of another."""
    document = json.loads(raw)
    inside = document
    key = draw.choice(sorted(document))
    if isinstance(document[key], dict) and document[key] and draw.random() < 0.7:
        inside = document[key]
        key = draw.choice(sorted(inside))
    inside[key] = draw.choice(VALUES)
    return json.dumps(document).encode()


def spoiled_folder(good: Path, folder: Path, draw: random.Random) -> Path:
    """Copy a folder and spoil one of its files; returns that file."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    raw = path.read_bytes()
    odd = path.suffix == ".json" and draw.random() < 0.5
    path.write_bytes(odd_value(raw, draw) if odd else spoil(raw, draw))
    return path


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
