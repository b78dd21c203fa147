"""Readers of tables and arrays: parquet, numpy arrays, torch tensors and datasets.

Rows come already decoded. Arrays are memory-mapped, parquet files and datasets on the hub are
streamed. Nothing in a file is ever run: arrays are read without pickles, tensors with
`weights_only=True`.

The lm-extraction-benchmark stores prefixes and suffixes in two arrays; `read_pair` joins
`NAME_prefix.npy` with the `NAME_suffix.npy` beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from memcircuits.data.formats.records import (
    BadRow,
    RawRow,
    Record,
    Source,
    Unusable,
    check_columns,
    errors_as_unusable,
    size_in_bytes,
)

PREFIX_ENDING, SUFFIX_ENDING = "_prefix.npy", "_suffix.npy"


def read_parquet(source: Source) -> Iterator[RawRow]:
    """Rows of a parquet file."""
    import pyarrow.parquet as pq

    number = 0
    with errors_as_unusable(), pq.ParquetFile(source.path) as file:
        check_columns(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=256):
            for record in _records(batch):
                number += 1
                if record is None:
                    where = f"{source.name}, row {number}"
                    yield number, BadRow(where, "it holds a string that is not UTF-8 text"), 0
                else:
                    yield number, record, size_in_bytes(record)


def _records(batch: Any) -> Iterable[Record | None]:
    """The rows of a batch; None for one whose strings are not UTF-8, which Arrow does not check."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return itertools.chain.from_iterable(
            _records(batch.slice(row, 1)) for row in range(len(batch))
        )


def read_npy(source: Source) -> Iterator[RawRow]:
    """Rows of an integer array [paragraph, pos]."""
    for number, ids in enumerate(_array(Path(source.path)), start=1):
        yield number, {"ids": ids}, ids.nbytes


def read_pair(source: Source) -> Iterator[RawRow]:
    """Rows of `NAME_prefix.npy`, each with its row of `NAME_suffix.npy`."""
    prefix_file = Path(source.path)
    suffix_file = suffix_of(prefix_file)
    if not suffix_file.is_file():
        raise Unusable(f"{suffix_file.name} must lie beside it")
    prefixes, suffixes = _array(prefix_file), _array(suffix_file)
    if len(prefixes) != len(suffixes):
        raise Unusable(f"it has {len(prefixes)} rows and {suffix_file.name} {len(suffixes)}")
    for number, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True), start=1):
        record = {"prefix_ids": prefix, "suffix_ids": suffix}
        yield number, record, prefix.nbytes + suffix.nbytes


def suffix_of(path: Path) -> Path:
    """The file of suffixes that belongs to a file of prefixes."""
    return path.with_name(path.name.removesuffix(PREFIX_ENDING) + SUFFIX_ENDING)


def is_suffix(path: Path) -> bool:
    """Whether this is the file of suffixes of a pair, and is read with its prefixes."""
    prefix_file = path.with_name(path.name.removesuffix(SUFFIX_ENDING) + PREFIX_ENDING)
    return path.name.endswith(SUFFIX_ENDING) and prefix_file.is_file()


def _array(path: Path) -> Any:
    import numpy as np

    with errors_as_unusable():
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise Unusable(f"{path.name} must hold integer ids [paragraph, pos]")
    return np.asarray(ids)


def read_pt(source: Source) -> Iterator[RawRow]:
    """Rows of an integer tensor [paragraph, pos]."""
    import pickle

    import torch

    problem = "not a plain tensor file, and nothing in it was run"
    with errors_as_unusable(problem):
        try:
            ids = torch.load(source.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's text advises to run what is in it
            raise Unusable(f"{problem}; save a tensor of ids") from None
    integer = isinstance(ids, torch.Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.is_quantized
    )
    if not integer or ids.ndim != 2 or ids.layout != torch.strided:
        raise Unusable("it must hold an integer tensor [paragraph, pos]")
    for number, row in enumerate(ids.detach().numpy(), start=1):
        yield number, {"ids": row}, row.nbytes


def read_dataset(source: Source) -> Iterator[RawRow]:
    """Rows of a dataset, streamed from the hub or saved in a folder."""
    number = 0
    with errors_as_unusable():
        for record in _open_dataset(source.path.removeprefix("hf:")):
            number += 1
            yield number, record, size_in_bytes(record)


def _open_dataset(path: str) -> Any:
    """The dataset `NAME[@REVISION][:SPLIT[:CONFIG]]`."""
    name, *parts = path.split(":")
    if len(parts) > 2:
        raise Unusable("its name is hf:NAME[@REVISION][:SPLIT[:CONFIG]]")
    split, config = (*parts, None, None)[:2]
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
    dataset = datasets.load_from_disk(name)
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    splits = list(dataset)
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        raise Unusable(f"name one of its splits ({', '.join(splits)}): hf:FOLDER:SPLIT")
    return dataset[split]


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
