"""The manifest of a corpus scan: everything that decides its numbers.

A scan may be continued by another process, on another day, on another machine. Its rows are only
comparable if weights, tokenizer, dtype, weight processing, files, windows and the tokens in front
of them are the same. The
manifest records all of these by name or hash; the first process writes it, and every other process
compares its own with it and stops if they differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memcircuits.base.errors import InputError
from memcircuits.data.formats.records import Columns, Source
from memcircuits.data.formats.sources import content_files
from memcircuits.data.normalizing import Normalize
from memcircuits.data.tokens import tokenizer_hash
from memcircuits.data.windows import Windows
from memcircuits.models.adapter import Adapter

SCHEMA = "memcircuits.scan-parts/1"

_WHAT_OLDER_SCANS_DID = {
    "bos": [],
    "columns": dataclasses.asdict(Columns()),
    "normalize": "none",
    "measures": ["em", "nll", "log_prob", "margin", "loose_match", "min_k"],
    "sampler": None,
}
_HASHED_BYTES = 2**16  # at both ends of a file


def new_manifest(
    adapter: Adapter,
    sources: Sequence[Source],
    windows: Windows,
    part_records: int,
    *,
    bos: tuple[int, ...],
    columns: Columns,
    normalize: Normalize,
) -> dict[str, Any]:
    """The manifest of a scan, in the form in which it is read back from JSON."""
    manifest = {
        "schema": SCHEMA,
        "model": model_identity(adapter),
        "windows": dataclasses.asdict(windows),
        "bos": bos,
        "columns": dataclasses.asdict(columns),
        "normalize": normalize,
        "part_records": part_records,
        "sources": [source_fingerprint(source) for source in sources],
    }
    restored: dict[str, Any] = json.loads(json.dumps(manifest))
    return restored


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        InputError: if there is none, or it is damaged or of another version.
    """
    folder = path.parent.name
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        schema = manifest["schema"]
    except FileNotFoundError:
        raise InputError("out", folder, "it holds no manifest.json of a scan") from None
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError("out", f"{folder}/manifest.json", f"damaged ({error})") from None
    if schema != SCHEMA:
        raise InputError("out", folder, f"its schema is {schema}, this version writes {SCHEMA}")
    return {**_WHAT_OLDER_SCANS_DID, **manifest}


def differences(written: dict[str, Any], expected: dict[str, Any]) -> str:
    """The entries in which a written manifest differs from an expected one, in words."""
    changes = []
    for key, value in expected.items():
        old = written.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            changes += [_difference(k, old.get(k), v) for k, v in value.items() if old.get(k) != v]
        elif old != value:
            changes.append(_difference(key, old, value))
    return ", ".join(changes)


def _difference(key: str, old: Any, new: Any) -> str:
    """The name of an entry, and both values where these are short."""
    is_short = all(isinstance(value, (int, float, str, type(None))) for value in (old, new))
    return f"{key} ({old} there, {new} here)" if is_short else key


def model_identity(adapter: Adapter) -> dict[str, Any]:
    """What decides a model's numbers: weights, tokenizer, dtype and weight processing."""
    return {
        "fingerprint": adapter.fingerprint(),
        "tokenizer": tokenizer_hash(adapter.tokenizer) if adapter.tokenizer is not None else "",
        "revision": adapter.revision,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "basis": adapter.basis,
    }


def source_fingerprint(source: Source) -> dict[str, Any]:
    """The identity of a source's content: its size, and the hash of its first and last 64 KiB.

    Reading a corpus of terabytes twice to hash all of it would double the cost of a scan.
    """
    digest = hashlib.sha256()
    total_bytes = 0
    files = [path for path in content_files(source) if path.is_file()]
    for path in files:
        n_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(0, n_bytes - _HASHED_BYTES))
            digest.update(file.read())
        total_bytes += n_bytes
    content = {"bytes": total_bytes, "ends": digest.hexdigest()[:16]} if files else {}
    return {"name": source.name, "kind": source.kind, **content}
