"""Readers for paragraph files: ids where the file has them, else text that is encoded once.

| ending | content |
| --- | --- |
| `.jsonl` | one object a line: `ids` (or `tokens`, `input_ids`) or `text` (or `paragraph`) |
| `.csv` | a column `text` or `paragraph` |
| `.txt` | paragraphs separated by blank lines |
| `.pt` | an integer tensor [paragraph, pos], read with `weights_only=True` |

Every other column becomes a fact of the paragraphs; `id` names them.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memcircuits.checks import InputError
from memcircuits.paragraphs import Paragraphs

_IDS = ("ids", "tokens", "input_ids")
_TEXT = ("text", "paragraph")


def read_paragraphs(
    path: str | os.PathLike[str], model: Any = None, *, n_prefix: int = 50, n_continuation: int = 50
) -> Paragraphs:
    """Read paragraphs from a file.

    Args:
        path: file; its ending names the format.
        model: model or tokenizer, needed where the file holds text.
        n_prefix: tokens of the prefix.
        n_continuation: tokens of the continuation; longer rows are cut.

    Raises:
        InputError: if the file is missing, of an unknown format, damaged, empty, or has rows that
            are too short.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("paragraphs", path.name, "there is no such file")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(
            "paragraphs", path.name, "known endings are " + ", ".join(sorted(_READERS))
        )
    length = n_prefix + n_continuation
    if path.suffix == ".pt":
        ids = _read_tensor(path)
        if ids.shape[1] < length:
            raise InputError(
                "paragraphs", f"{path.name} has {ids.shape[1]} tokens a row", f"{length} are needed"
            )
        return Paragraphs.from_tokens(ids[:, :length], n_prefix=n_prefix)
    records = [(n, record) for n, record in reader(path)]
    if not records:
        raise InputError("paragraphs", f"{path.name} is empty", "give at least one paragraph")
    columns = set(records[0][1])
    ids_key = next((key for key in _IDS if key in columns), None)
    text_key = next((key for key in _TEXT if key in columns), None)
    if ids_key is None and text_key is None:
        raise InputError(
            "paragraphs",
            f"{path.name} has columns {sorted(columns)}",
            f"it needs one of {', '.join(_IDS + _TEXT)}",
        )
    rows = []
    for number, record in records:
        rows.append(_row(path, number, record, ids_key, text_key, model, length))
    facts = {
        key: tuple(record.get(key) for _, record in records)
        for key in records[0][1]
        if key not in ("id", ids_key, text_key)
    }
    names = tuple(
        str(record.get("id", f"{path.stem}-{i:05d}")) for i, (_, record) in enumerate(records)
    )
    return Paragraphs(torch.tensor(rows, dtype=torch.long), n_prefix, names, facts)


def _row(
    path: Path,
    number: int,
    record: dict[str, Any],
    ids_key: str | None,
    text_key: str | None,
    model: Any,
    length: int,
) -> list[int]:
    where = f"{path.name}, row {number}"
    if ids_key is not None:
        ids = record.get(ids_key)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError("paragraphs", where, f"{ids_key} must be a list of token ids")
    else:
        text = record.get(text_key or "")
        if not isinstance(text, str):
            raise InputError("paragraphs", where, f"{text_key} must be a string")
        if model is None:
            raise InputError(
                "model", "None", f"{path.name} holds text: pass the model to encode it"
            )
        from memcircuits.paragraphs import encode

        ids = encode(text, model)
    if len(ids) < length:
        raise InputError(
            "paragraphs",
            f"{where} has {len(ids)} tokens",
            f"{length} are needed; use smaller lengths or remove the row",
        )
    return ids[:length]


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                "paragraphs", f"{path.name}, line {number}", f"not JSON ({error})"
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                "paragraphs", f"{path.name}, line {number}", "give a JSON object a line"
            )
        yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pandas as pd

    try:
        frame = pd.read_csv(path, encoding="utf-8", keep_default_na=False)
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError("paragraphs", path.name, f"not a readable CSV file ({error})") from None
    for number, record in enumerate(frame.to_dict("records"), start=2):
        yield number, {str(key): value for key, value in record.items()}


def _txt(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    block: list[str] = []
    start = 1
    for number, line in _lines(path):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield start, {"text": "".join(block).strip()}
            block = []
    if block:
        yield start, {"text": "".join(block).strip()}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise InputError("paragraphs", path.name, f"not UTF-8 text ({error.reason})") from None


def _read_tensor(path: Path) -> Tensor:
    try:
        ids = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            "paragraphs", path.name, f"not a plain tensor file; nothing in it was run ({reason})"
        ) from None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError("paragraphs", path.name, "it must hold an integer tensor [paragraph, pos]")
    return ids


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".pt": _read_tensor}
