"""Tables of Arrow: parquet, Arrow and Feather files, and what the package `datasets` saves.

Rows come already decoded, batch by batch. Files are read and not mapped into memory: a mapped file
that is cut while it is read would end the process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from memcircuits.data.formats.columns import check_columns, unique_columns
from memcircuits.data.formats.records import (
    BadRow,
    RawRow,
    Record,
    Source,
    Unusable,
    errors_as_unusable,
    size_in_bytes,
)

_ROWS = 256  # rows that are decoded at once


def read_parquet(source: Source) -> Iterator[RawRow]:
    """Rows of a parquet file."""
    import pyarrow.parquet as pq

    with errors_as_unusable(), pq.ParquetFile(source.path) as file:
        check_columns(file.schema_arrow.names, source.columns)
        yield from _rows(source, file.iter_batches(batch_size=_ROWS))


def read_arrow(source: Source) -> Iterator[RawRow]:
    """Rows of an Arrow file, an Arrow stream, or a Feather file of either version."""
    import pyarrow as pa

    with errors_as_unusable(), contextlib.ExitStack() as stack:
        file = stack.enter_context(pa.OSFile(source.path))
        magic = file.read(6)
        file.seek(0)
        if magic.startswith(b"FEA1"):
            from pyarrow import feather

            table = feather.read_table(source.path, memory_map=False)
            schema, batches = table.schema, iter(table.to_batches())
        elif magic == b"ARROW1":
            opened = stack.enter_context(pa.ipc.open_file(file))
            schema = opened.schema
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            opened = stack.enter_context(pa.ipc.open_stream(file))
            schema, batches = opened.schema, iter(opened)
        check_columns(schema.names, source.columns)
        checked = (_checked(batch) for batch in batches)
        pieces = (batch.slice(i, _ROWS) for batch in checked for i in range(0, len(batch), _ROWS))
        yield from _rows(source, pieces)


def _checked(batch: Any) -> Any:
    """The batch, if its offsets lie inside its buffers: Arrow believes what a file says.

    Strings that are not UTF-8 are left to `_records`, which passes over their rows alone.
    """
    try:
        batch.validate(full=True)
    except ValueError as error:  # pyarrow's errors derive from it
        if "UTF8" not in str(error):
            raise
    return batch


def _rows(source: Source, batches: Iterable[Any]) -> Iterator[RawRow]:
    import pyarrow as pa

    number = 0
    for batch in batches:
        names = unique_columns(batch.schema.names)
        for record in _records(pa.RecordBatch.from_arrays(batch.columns, names=names)):
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


def read_dataset(source: Source) -> Iterator[RawRow]:
    """Rows of a dataset, streamed from the hub or from a folder of files."""
    number = 0
    with errors_as_unusable():
        for record in _open_dataset(source.path.removeprefix("hf:")):
            number += 1
            yield number, record, size_in_bytes(record)


def _open_dataset(path: str) -> Any:
    """The dataset `NAME[@REVISION][:SPLIT[:CONFIG]]`."""
    name, split, config = dataset_parts(path)
    try:
        import datasets
    except ImportError:
        raise Unusable("install the package datasets to read it") from None
    revision = None
    if not Path(name).exists():
        name, _, revision = name.partition("@")
    return datasets.load_dataset(
        name, config, split=split or "train", revision=revision or None, streaming=True
    )


def dataset_parts(path: str) -> tuple[str, str | None, str | None]:
    """Name (with revision), split and configuration of `NAME[@REVISION][:SPLIT[:CONFIG]]`.

    Raises:
        Unusable: if there are more parts.
    """
    name, *parts = path.split(":")
    if len(parts) > 2:
        raise Unusable("its name is hf:NAME[@REVISION][:SPLIT[:CONFIG]]")
    split, config = (*parts, None, None)[:2]
    return name, split, config


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def files_of_saved_dataset(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, in order.

    Raises:
        Unusable: if it has several splits and none of them is named, or is damaged.
    """
    with errors_as_unusable("the folder of a dataset is damaged"):
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
            if split is None and len(splits) == 1:
                split = splits[0]
            if split not in splits:
                raise Unusable(f"name one of its splits ({', '.join(splits)}): hf:FOLDER:SPLIT")
            folder /= str(split)
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
