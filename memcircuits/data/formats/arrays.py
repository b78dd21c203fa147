"""Arrays and tensors of token ids: numpy and torch files, pairs of them, recognised by shape.

| content | read as |
| --- | --- |
| an integer array [paragraph, pos] | token ids |
| several arrays of equally many rows, by name or one after the other | columns |
| two integer arrays, or the files `NAME_prefix` and `NAME_suffix` | prefix and continuation |
| a list of arrays or lists of different lengths | token ids, one row each |

The two arrays of lm-extraction-benchmark (prefix and suffix, [n, 50] each) and the paper's tensor
[n, 100] are instances. Nothing in a file is ever run: arrays are read without pickles, tensors with
`weights_only=True`. Arrays are read block by block and not mapped into memory, because a mapped
file that is cut while it is read would end the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from memcircuits.data.formats.columns import ID_PAIRS, is_usable
from memcircuits.data.formats.records import (
    Columns,
    RawRow,
    Source,
    Unusable,
    errors_as_unusable,
    size_in_bytes,
)

_BLOCK = 2**22  # bytes of an array that are read at once
_WANTED = "it must hold integer ids [paragraph, pos]"


def read_npy(source: Source) -> Iterator[RawRow]:
    """Rows of an integer array [paragraph, pos]."""
    for number, ids in enumerate(_array_rows(Path(source.path)), start=1):
        yield number, {"ids": ids}, ids.nbytes


def read_npz(source: Source) -> Iterator[RawRow]:
    """Rows of several arrays in one file, each a column."""
    import numpy as np

    with errors_as_unusable(), np.load(source.path, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    yield from _rows_of_columns(columns, source.columns)


def read_pt(source: Source) -> Iterator[RawRow]:
    """Rows of a tensor [paragraph, pos], of several tensors by name, or of a list of them."""
    import pickle

    import torch

    problem = "not a plain tensor file, and nothing in it was run"
    with errors_as_unusable(problem):
        try:
            content = torch.load(source.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's text advises to run what is in it
            raise Unusable(f"{problem}; save a tensor of ids") from None
    if isinstance(content, torch.Tensor):
        content = {"ids": _checked(_plain(content))}
    if isinstance(content, (list, tuple)):
        content = _columns_of_list(content)
    if not isinstance(content, Mapping):
        raise Unusable(_WANTED)
    columns = {str(name): _plain(value) for name, value in content.items()}
    yield from _rows_of_columns(columns, source.columns)


def read_pair(source: Source) -> Iterator[RawRow]:
    """Rows of the prefixes' file, each with its row of the suffixes' file."""
    prefix_file = Path(source.path)
    suffix_file = other_half(prefix_file)
    if suffix_file is None or not suffix_file.is_file():
        name = suffix_file.name if suffix_file else "the file of suffixes"
        raise Unusable(f"{name} must lie beside it")
    prefixes, suffixes = _array_rows(prefix_file), _array_rows(suffix_file)
    number = 0
    for prefix in prefixes:
        suffix = next(suffixes, None)
        if suffix is None:
            raise Unusable(f"it has more than the {number} rows of {suffix_file.name}")
        number += 1
        record = {"prefix_ids": prefix, "suffix_ids": suffix}
        yield number, record, prefix.nbytes + suffix.nbytes
    if next(suffixes, None) is not None:
        raise Unusable(f"it has {number} rows and {suffix_file.name} more")


_HALVES = (("prefix", "suffix"), ("prefixes", "suffixes"), ("prefix", "continuation"))
_ENDINGS = (".npy", ".pt")


def other_half(path: Path) -> Path | None:
    """The file of suffixes that belongs to a file of prefixes; None if this is no such file.

    The first of the usual names that exists, `NAME_suffix` if none does.
    """
    if path.suffix.lower() not in _ENDINGS:
        return None
    names = []
    for prefix, suffix in _HALVES:
        start = path.stem[: -len(prefix)]
        if path.stem.lower().endswith(prefix) and start[-1:] in ("", "_", "-", "."):
            names.append(path.with_name(f"{start}{suffix}{path.suffix}"))
    return next((name for name in names if name.is_file()), names[0] if names else None)


def first_half(path: Path) -> Path | None:
    """The file of prefixes that belongs to a file of suffixes, if both exist."""
    for prefix, suffix in _HALVES:
        if path.stem.lower().endswith(suffix):
            candidate = path.with_name(f"{path.stem[: -len(suffix)]}{prefix}{path.suffix}")
            if candidate.is_file() and other_half(candidate) == path:
                return candidate
    return None


def stands_before_pair(path: Path) -> bool:
    """Whether lm-extraction-benchmark keeps in this file what stands before a pair's prefixes.

    Beside `NAME_prefix` and `NAME_suffix` it has `NAME_preprefix`, and `NAME_dataset` with all
    three.
    """
    name, _, kind = path.stem.rpartition("_")
    prefix_file = path.with_name(f"{name}_prefix{path.suffix}")
    return kind in ("preprefix", "dataset") and prefix_file.is_file()


def _array_rows(path: Path) -> Iterator[Any]:
    """The rows of a file of one integer array, read block by block."""
    if path.suffix.lower() == ".pt":
        ids = _plain(_tensor_of_file(path))
        yield from _checked(ids, path.name)
        return
    import numpy as np
    from numpy.lib import format as npy

    with errors_as_unusable(), open(path, "rb") as file:
        read_header = (
            npy.read_array_header_1_0
            if npy.read_magic(file) == (1, 0)
            else npy.read_array_header_2_0
        )
        shape, is_fortran, dtype = read_header(file)
        if len(shape) != 2 or dtype.kind not in "iu":
            raise Unusable(f"{path.name} must hold integer ids [paragraph, pos]")
        if is_fortran:
            file.seek(0)
            yield from npy.read_array(file, allow_pickle=False)
            return
        yield from _blocks(file, shape, dtype, np)


def _blocks(file: IO[bytes], shape: tuple[int, int], dtype: Any, np: Any) -> Iterator[Any]:
    n_rows, length = shape
    row_bytes = length * dtype.itemsize
    rows_per_block = max(1, _BLOCK // max(1, row_bytes))
    for start in range(0, n_rows, rows_per_block):
        n = min(rows_per_block, n_rows - start)
        raw = file.read(n * row_bytes)
        whole = len(raw) // row_bytes if row_bytes else n
        yield from np.frombuffer(raw[: whole * row_bytes], dtype).reshape(whole, length)
        if whole < n:
            raise Unusable(f"it cannot be read (it ends after row {start + whole} of {n_rows})")


def _tensor_of_file(path: Path) -> Any:
    import torch

    with errors_as_unusable("not a plain tensor file, and nothing in it was run"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain(value: Any) -> Any:
    """A tensor as an array; other values as they are.

    Raises:
        Unusable: if the tensor is sparse or quantized.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    if value.layout != torch.strided or value.is_quantized:
        raise Unusable(_WANTED)
    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _columns_of_list(content: Sequence[Any]) -> dict[str, Any]:
    """Columns of a list: two arrays of equally many rows, or one row of ids each."""
    rows = [_plain(value) for value in content]
    if len(rows) == 2 and all(getattr(row, "ndim", 0) == 2 for row in rows):
        return dict(zip(ID_PAIRS[0], rows, strict=True))
    return {"ids": rows}


def _rows_of_columns(columns: dict[str, Any], named: Columns) -> Iterator[RawRow]:
    """The rows of columns that are arrays, or lists, of equally many rows."""
    columns = {name: values for name, values in columns.items() if _n_rows(values) is not None}
    if not is_usable(columns, named):
        columns = _named_by_shape(columns)
    for name, values in columns.items():
        if hasattr(values, "ndim") and name in ("ids", *ID_PAIRS[0]):
            _checked(values)
    n_rows = max((len(values) for values in columns.values()), default=0)
    if any(len(values) != n_rows for values in columns.values()):
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise Unusable(f"its arrays have different numbers of rows ({lengths})")
    for number in range(n_rows):
        record = {name: values[number] for name, values in columns.items()}
        record = {name: _plain_scalar(value) for name, value in record.items()}
        yield number + 1, record, size_in_bytes(record) or 8 * len(next(iter(columns.values())))


def _n_rows(values: Any) -> int | None:
    if isinstance(values, (list, tuple)):
        return len(values)
    return len(values) if getattr(values, "ndim", 0) else None


def _named_by_shape(columns: dict[str, Any]) -> dict[str, Any]:
    """Usual names for arrays that have others: one array of ids, or two of equally many rows.

    Raises:
        Unusable: if their shapes do not tell which they are.
    """
    import numpy as np

    def is_ids(values: Any) -> bool:
        return isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype.kind in "iu"

    ids = [name for name, values in columns.items() if is_ids(values)]
    if len(ids) == 1:
        names = {ids[0]: "ids"}
    elif len(ids) == 2 and len(columns[ids[0]]) == len(columns[ids[1]]):
        ids = sorted(ids, key=lambda name: any(half[1] in name.lower() for half in _HALVES))
        names = dict(zip(ids, ID_PAIRS[0], strict=True))
    else:
        shapes = ", ".join(
            f"{name} {getattr(values, 'shape', len(values))}" for name, values in columns.items()
        )
        raise Unusable(f"{_WANTED}, or two of them: its arrays are {shapes or 'none'}")
    return {names.get(name, name): values for name, values in columns.items()}


def _checked(ids: Any, name: str = "it") -> Any:
    """The array, if it holds integers [paragraph, pos]."""
    if getattr(ids, "ndim", 0) != 2 or ids.dtype.kind not in "iu":
        raise Unusable(f"{name} must hold integer ids [paragraph, pos]")
    return ids


def _plain_scalar(value: Any) -> Any:
    """Entries of one-dimensional columns as values of Python; rows as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
