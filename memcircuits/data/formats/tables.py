"""TODO."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from memcircuits.data.formats.records import (
    BadRow,
    Source,
    Unusable,
    check_columns,
    damage,
    size_in_bytes,
)


def read_parquet(source: Source) -> Iterator[tuple[int, Any, int]]:
    import pyarrow.parquet as pq

    number = 0
    with damage(), pq.ParquetFile(source.path) as file:
        check_columns(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=256):
            for record in _records(batch):
                number += 1
                if record is None:
                    where = f"{source.name}, row {number}"
                    yield number, BadRow(where, "it holds a string that is not UTF-8 text"), 0
                else:
                    yield number, record, size_in_bytes(record)


def _records(batch: Any) -> Iterable[dict[str, Any] | None]:
    """The rows of a batch; None for one whose strings are not UTF-8, which Arrow does not check."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return itertools.chain.from_iterable(
            _records(batch.slice(row, 1)) for row in range(len(batch))
        )


def read_npy(source: Source) -> Iterator[tuple[int, Any, int]]:
    for number, row in enumerate(_array(Path(source.path)), start=1):
        yield number, {"ids": row}, row.nbytes


def read_pair(source: Source) -> Iterator[tuple[int, Any, int]]:
    """`NAME_prefix.npy` and `NAME_suffix.npy` (lm-extraction-benchmark)."""
    first = Path(source.path)
    second = second_half(first)
    if not second.is_file():
        raise Unusable(f"{second.name} must lie beside it")
    prefix, suffix = _array(first), _array(second)
    if len(prefix) != len(suffix):
        raise Unusable(f"it has {len(prefix)} rows and {second.name} {len(suffix)}")
    for number, (a, b) in enumerate(zip(prefix, suffix, strict=True), start=1):
        yield number, {"prefix_ids": a, "suffix_ids": b}, a.nbytes + b.nbytes


def _array(path: Path) -> Any:
    import numpy as np

    with damage():
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise Unusable(f"{path.name} must hold integer ids [paragraph, pos]")
    return np.asarray(ids)


def read_pt(source: Source) -> Iterator[tuple[int, Any, int]]:
    import torch

    with damage("not a plain tensor file, and nothing in it was run"):
        ids = torch.load(source.path, map_location="cpu", weights_only=True)
    integer = isinstance(ids, torch.Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.is_quantized
    )
    if not integer or ids.ndim != 2 or ids.layout != torch.strided:
        raise Unusable("it must hold an integer tensor [paragraph, pos]")
    for number, row in enumerate(ids.detach().numpy(), start=1):
        yield number, {"ids": row}, row.nbytes


def read_dataset(source: Source) -> Iterator[tuple[int, Any, int]]:
    number = 0
    with damage():
        for record in open_dataset(*source.path.removeprefix("hf:").split(":")):
            number += 1
            yield number, record, size_in_bytes(record)


def open_dataset(name: str, split: str | None = None, config: str | None = None, *more: str) -> Any:
    if more:
        raise Unusable("its name is hf:NAME[@REVISION][:SPLIT[:CONFIG]]")
    try:
        import datasets
    except ImportError:
        raise Unusable("install the package datasets to read it") from None
    if not is_saved_dataset(Path(name)):
        revision = None
        if not Path(name).exists():
            name, _, revision = name.partition("@")
        return datasets.load_dataset(
            name, config, split=split or "train", revision=revision or None, streaming=True
        )
    found = datasets.load_from_disk(name)
    if isinstance(found, datasets.DatasetDict):
        splits = list(found)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise Unusable(f"name one of its splits ({', '.join(splits)}): hf:FOLDER:SPLIT")
        return found[split]
    return found


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def second_half(path: Path) -> Path:
    return path.with_name(path.name.removesuffix("_prefix.npy") + "_suffix.npy")


def is_second_half(path: Path) -> bool:
    first = path.with_name(path.name.removesuffix("_suffix.npy") + "_prefix.npy")
    return path.name.endswith("_suffix.npy") and first.is_file()
