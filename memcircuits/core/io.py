"""Atomic writing and safetensors files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from memcircuits.core.errors import InputError


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a whole file or nothing: a temporary file beside it, then `os.replace`."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise InputError("path", path.name, "it is a folder; give a file name")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def safetensors_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: safetensors orders headers anew."""
    from safetensors.torch import save

    raw = save(dict(tensors), metadata=dict(header))
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data behind it
    return len(text).to_bytes(8, "little") + text + raw[end:]


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        InputError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(path).name
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError("path", name, "there is no such file") from None
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise InputError("path", name, f"not a readable safetensors file ({error})") from None
