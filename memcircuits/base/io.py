"""Files that appear whole or not at all, and safetensors files.

A result is written under a temporary name in the same folder and then renamed: renaming within one
file system is atomic, so a reader, a crash or a second process never meets half a file. Everything
that the package writes passes through this module:

- `write_atomically` for content that is already in memory,
- `atomic_file` and `atomic_folder` where a library does the writing,
- `write_if_absent` where several processes may write the same file and the first one counts.

Temporary names start with a dot, and a failed write removes its temporary file. New files and
folders get the permissions that the user's umask gives to any new file, whatever the library that
wrote them chose.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from memcircuits.base.errors import InputError


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file (text as UTF-8); an older file is replaced in one step.

    Returns:
        The path.

    Raises:
        InputError: if `path` is a folder.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(_encoded(data))
    return Path(path)


def write_if_absent(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file unless it exists already: of several processes, the first one writes it."""
    path = Path(path)
    with _temporary_file(path) as temporary:
        temporary.write_bytes(_encoded(data))
        with suppress(FileExistsError):
            os.link(temporary, path)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; on leaving without an error, its file is moved to `path`.

    The body passes it to whatever writes the file, such as `torch.save(state, temporary)`.

    Raises:
        InputError: if `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError("path", path.name, "it is a folder; give a file name")
    with _temporary_file(path) as temporary:
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to fill; on leaving without an error, it is moved to `folder`.

    `folder` must not exist yet, or be empty.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(folder)
    temporary.mkdir()
    permissions = temporary.stat().st_mode
    try:
        yield temporary
        for path in temporary.rglob("*"):
            path.chmod(permissions if path.is_dir() else permissions & 0o666)
        if folder.exists():
            folder.rmdir()  # fails unless it is empty
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, removed on leaving unless it was moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _encoded(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


def safetensors_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; equal content gives equal bytes.

    The library orders the header's keys differently from run to run, so they are sorted here.
    """
    from safetensors.torch import save

    raw = save(dict(tensors), metadata=dict(header))
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data that follow
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
