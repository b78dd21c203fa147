"""TODO."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from memcircuits.core.errors import InputError
from memcircuits.data.formats.records import Source
from memcircuits.data.formats.sources import content_files
from memcircuits.data.tokens import tokenizer_hash
from memcircuits.models.adapter import Adapter

SCHEMA = "memcircuits.scan-parts/1"


def differences(written: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What of a manifest is other than wanted, numbers with both values."""
    found = []
    for key, value in wanted.items():
        old = written.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found += [_difference(k, old.get(k), v) for k, v in value.items() if old.get(k) != v]
        elif old != value:
            found.append(_difference(key, old, value))
    return ", ".join(found)


def _difference(key: str, old: Any, new: Any) -> str:
    short = all(isinstance(value, (int, float, str, type(None))) for value in (old, new))
    return f"{key} ({old} there, {new} here)" if short else key


def model_identity(adapter: Adapter) -> dict[str, Any]:
    return {
        "fingerprint": adapter.fingerprint(),
        "tokenizer": tokenizer_hash(adapter.tokenizer) if adapter.tokenizer is not None else "",
        "revision": adapter.revision,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "basis": adapter.basis,
    }


def source_fingerprint(source: Source) -> dict[str, Any]:
    """Names the content of a source: sizes, and the hash of the first and last 64 KiB."""
    digest = hashlib.sha256()
    size = 0
    files = [path for path in content_files(source) if path.is_file()]
    for path in files:
        n_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            digest.update(file.read(2**16))
            file.seek(max(0, n_bytes - 2**16))
            digest.update(file.read())
        size += n_bytes
    content = {"bytes": size, "ends": digest.hexdigest()[:16]} if files else {}
    return {"name": source.name, "kind": source.kind, **content}


def read_manifest(path: Path) -> dict[str, Any]:
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
    return manifest
