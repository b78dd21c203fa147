"""File formats: from bytes to rows, one after the other, in bounded memory.

A *source* is one file (or a Hugging Face dataset); `find_sources` lists those of a folder in a
fixed order. Reading has two halves, so that work can be shared out:

1. `read_chunks` only finds where rows begin and end and groups them into *chunks*. Chunks depend on
   the source alone, never on the machine, so they are the units of work of long scans; a chunk that
   is already done costs no more than finding its end.
2. `Chunk.rows` decodes: every row becomes a `Row` (token ids or text, a name, further columns) or a
   `BadRow` that says what is wrong with it. A file that cannot be read on ends in a `BadRow` too.

Lines and text blocks above `LIMIT` bytes are passed over without being held in memory. An empty
file is one `BadRow` too: in a corpus of many files it may be the trace of a copy that failed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from memcircuits.checks import InputError

LIMIT = 16 * 2**20
EMPTY = "it is empty"
IDS = ("ids", "tokens", "input_ids", "token_ids")
TEXT = ("text", "paragraph")
SPLIT = ("prefix_ids", "suffix_ids")
NAMES = ("id", "index")
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_TOO_LONG = f"longer than {LIMIT // 2**20} MiB; split it into shorter documents"
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d{1,3})?")


@dataclass(frozen=True)
class Source:
    """One file or dataset.

    Attributes:
        path: where it is.
        name: what it is called in results: the path below the folder that was asked for.
        kind: key of the table of formats.
    """

    path: str
    name: str
    kind: str

    @property
    def stem(self) -> str:
        """The name without its endings."""
        path = PurePosixPath(self.name)
        path = path.with_suffix("") if path.suffix in _COMPRESSION else path
        return str(path if self.kind == "hf" else path.with_suffix(""))

    @property
    def unit(self) -> str:
        """What its rows are counted in."""
        return "line" if self.kind in ("jsonl", "csv", "txt") else "row"


@dataclass(frozen=True)
class BadRow:
    """A row, or the rest of a file, that cannot be used, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One usable row: `ids`, or else `text` still to be encoded.

    Attributes:
        where: file and row, for messages.
        number: line or row number in the file.
        name: its `id` column, or file and row number.
        text: the text, None where ids are given.
        ids: token ids, None where text is given.
        split: tokens of the prefix, where the file itself separates it from the continuation.
        facts: all other columns; never the text, which can be decoded.
    """

    where: str
    number: int
    name: str
    text: str | None = None
    ids: list[int] | None = None
    split: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one source, not decoded yet.

    Attributes:
        source: the file.
        index: number of the chunk in its source.
        raw: (row number, undecoded row).
    """

    source: Source
    index: int
    raw: list[tuple[int, Any]]

    def rows(self) -> Iterator[Row | BadRow]:
        """Decode the rows."""
        decode = FORMATS[self.source.kind][1]
        for number, raw in self.raw:
            if isinstance(raw, BadRow):
                yield raw
                continue
            where = f"{self.source.name}, {self.source.unit} {number}"
            try:
                yield _row(self.source, number, where, decode(raw))
            except _Unusable as problem:
                yield BadRow(where, str(problem))
            except RecursionError:
                yield BadRow(where, "its columns are nested too deeply")


class _Unusable(Exception):
    """Why a row, or what is left of a file, cannot be used."""


def find_sources(path: str | os.PathLike[str]) -> list[Source]:
    """The files of a corpus, in a fixed order.

    Args:
        path: a file; a folder, whose files of known formats are taken in the order of their names;
            or `hf:NAME[@REVISION][:SPLIT[:CONFIG]]`, a dataset on the hub (streamed) or a saved
            one. A scan that may be resumed should pin the revision.

    Raises:
        InputError: if there is nothing to read, or a file's format is not known.
    """
    name = os.fspath(path)
    if name.startswith("hf:"):
        return [Source(name, name.removeprefix("hf:").lstrip("/"), "hf")]
    found = Path(path)
    try:
        is_file, is_folder = found.is_file(), found.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_file = is_folder = False
    if is_folder:
        if _is_saved_dataset(found):
            return [Source(f"hf:{found}", found.name, "hf")]
        if (found / "manifest.json").is_file() and (found / "parts").is_dir():
            found /= "parts"
        files = sorted(f for f in found.rglob("*") if f.is_file() and not _hidden(f, found))
        kinds = [(f, _kind(f)) for f in files if not _is_second_half(f)]
        sources = [Source(str(f), f.relative_to(found).as_posix(), k) for f, k in kinds if k]
        if not sources:
            raise InputError("paragraphs", f"{found.name} is a folder", f"it holds no {_ENDINGS}")
        return sources
    if not is_file:
        raise InputError("paragraphs", found.name, "there is no such file")
    kind = _kind(found)
    if kind is None:
        raise InputError("paragraphs", found.name, f"known endings are {_ENDINGS}")
    return [Source(str(found), found.name, kind)]


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """All rows of a source; see `read_chunks`."""
    for chunk in read_chunks(source):
        yield from chunk.rows()


def read_chunks(source: Source, records: int = 1024) -> Iterator[Chunk]:
    """Group the rows of a source: at most `records` rows and as many KiB (or one longer row)."""
    raw: list[tuple[int, Any]] = []
    size = index = 0
    for number, content, n_bytes in _raw_or_bad(source):
        if raw and (len(raw) == records or size + n_bytes > records * 1024):
            yield Chunk(source, index, raw)
            raw, size, index = [], 0, index + 1
        raw.append((number, content))
        size += n_bytes
    if raw:
        yield Chunk(source, index, raw)


def _raw_or_bad(source: Source) -> Iterator[tuple[int, Any, int]]:
    number = 0
    try:
        for number, content, n_bytes in FORMATS[source.kind][0](source):
            yield number, content, n_bytes
    except _Unusable as problem:
        where = f"{source.name}, after {source.unit} {number}" if number else source.name
        yield number + 1, BadRow(where, str(problem)), 0
        return
    if not number:
        yield 1, BadRow(source.name, EMPTY), 0


# -- from a record to a row ---------------------------------------------------------------------


def _row(source: Source, number: int, where: str, record: dict[str, Any]) -> Row:
    used: tuple[str, ...]
    text, ids, split = None, None, None
    _check_columns(record)
    if all(key in record for key in SPLIT):
        used = SPLIT
        prefix, suffix = (_ids(record, half) for half in used)
        ids, split = prefix + suffix, len(prefix)
    else:
        key = next(key for key in (*IDS, *TEXT) if key in record)
        used = (key,)
        if key in IDS:
            ids = _ids(record, key)
        else:
            text = _text(record, key)
    name = next((record[key] for key in NAMES if record.get(key) is not None), None)
    return Row(
        where,
        number,
        f"{source.stem}-{number:05d}" if name is None else printable(name),
        text,
        ids,
        split,
        {printable(k): _clean(v) for k, v in record.items() if k not in ("id", "text", *used)},
    )


def _check_columns(columns: Collection[str]) -> None:
    if all(key in columns for key in SPLIT) or any(key in columns for key in (*IDS, *TEXT)):
        return
    shown = ", ".join(printable(name) for name in list(columns)[:10]) or "none"
    raise _Unusable(
        f"its columns are {shown}; it needs one of {', '.join(IDS + TEXT)}, "
        "or prefix_ids and suffix_ids"
    )


def _ids(record: dict[str, Any], key: str) -> list[int]:
    ids = record[key]
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise _Unusable(f"{key} must be a list of token ids")
    return ids


def _text(record: dict[str, Any], key: str) -> str:
    text = record[key]
    if isinstance(text, bytes):
        text = _utf8(text)
    if not isinstance(text, str):
        raise _Unusable(f"{key} must be a string")
    if len(text) > LIMIT:
        raise _Unusable(_TOO_LONG)
    if printable(text) != text:
        raise _Unusable(f"{key} is not UTF-8 text")
    return text


def printable(value: Any) -> str:
    """`str(value)` without halves of surrogate pairs, which no file or screen can take."""
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "backslashreplace").decode() if not text.isascii() else text


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, dict):
        return {printable(k): _clean(v) for k, v in value.items()}
    return value


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise _Unusable(f"not UTF-8 text ({error.reason})") from None


# -- lines --------------------------------------------------------------------------------------


def _lines(source: Source) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is too long."""
    import pyarrow as pa

    codec = _COMPRESSION.get(Path(source.path).suffix)
    with _damage(), contextlib.ExitStack() as stack:
        raw = stack.enter_context(pa.input_stream(source.path, compression=codec))
        stream = stack.enter_context(io.BufferedReader(raw, 2**16))
        number = 0
        while line := stream.readline(LIMIT + 1):
            number += 1
            if len(line) <= LIMIT:
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = stream.readline(LIMIT)
            yield number, None


def _read_jsonl(source: Source) -> Iterator[tuple[int, Any, int]]:
    for number, line in _lines(source):
        if line is None:
            yield number, BadRow(f"{source.name}, line {number}", _TOO_LONG), 0
        elif not line.isspace():
            yield number, line, len(line)


def _decode_json(line: bytes) -> dict[str, Any]:
    text = _utf8(line)
    try:
        record = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _Unusable("give a JSON object a line")
    return record


def _read_txt(source: Source) -> Iterator[tuple[int, Any, int]]:
    """Blocks between blank lines."""
    block: list[bytes] = []
    start = size = 0

    def found() -> tuple[int, Any, int]:
        if size > LIMIT:
            return start, BadRow(f"{source.name}, line {start}", _TOO_LONG), 0
        return start, b"".join(block), size

    for number, line in _lines(source):
        if line is not None and not line.strip(b"\xef\xbb\xbf \t\r\n\f\v"):
            if size:
                yield found()
            block, size = [], 0
            continue
        if not size:
            start = number
        size += LIMIT + 1 if line is None else len(line)
        if size > LIMIT:
            block = []
        else:
            block.append(line or b"")
    if size:
        yield found()


def _decode_txt(block: bytes) -> dict[str, Any]:
    return {"text": _utf8(block).strip()}


def _read_csv(source: Source) -> Iterator[tuple[int, Any, int]]:
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for number, line in _lines(source):
            if line is None:
                raise _Unusable(f"line {number} is {_TOO_LONG}")
            size += len(line)
            # Bytes that are no UTF-8 become lone surrogates, which `_text` refuses row by row.
            yield line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        start, size = reader.line_num + 1, 0
        try:
            with _wide_fields():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _Unusable(f"line {start} is not CSV ({error})") from None
        if header is None:
            header = fields
            _check_columns(header)
        elif len(fields) == len(header):
            yield start, dict(zip(header, fields, strict=True)), size
        elif fields:
            reason = f"{len(fields)} fields where the header has {len(header)}"
            yield start, BadRow(f"{source.name}, line {start}", reason), size


@contextlib.contextmanager
def _wide_fields() -> Iterator[None]:
    """Let the csv module take long fields for one row; its limit is one for the whole process."""
    before = csv.field_size_limit(LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _decode_csv(record: dict[str, str]) -> dict[str, Any]:
    return {k: v if k in (*TEXT, *NAMES) else _number(v) for k, v in record.items()}


def _number(text: str) -> Any:
    """Numbers as numbers, everything else as it is written (`007` too)."""
    found = _NUMBER.fullmatch(text)
    if not found:
        return text
    if not (found[2] or found[3]):
        return int(text)
    return float(text) if math.isfinite(float(text)) else text


# -- tables and tensors -------------------------------------------------------------------------


def _read_parquet(source: Source) -> Iterator[tuple[int, Any, int]]:
    import pyarrow.parquet as pq

    number = 0
    with _damage(), pq.ParquetFile(source.path) as file:
        _check_columns(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=256):
            for record in _records(batch):
                number += 1
                if record is None:
                    where = f"{source.name}, row {number}"
                    yield number, BadRow(where, "it holds a string that is not UTF-8 text"), 0
                else:
                    yield number, record, _size(record)


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


def _size(record: dict[str, Any]) -> int:
    return sum(
        len(value) if isinstance(value, (str, bytes)) else 8 * len(value)
        for value in record.values()
        if isinstance(value, (str, bytes, list))
    )


def _read_npy(source: Source) -> Iterator[tuple[int, Any, int]]:
    for number, row in enumerate(_array(Path(source.path)), start=1):
        yield number, {"ids": row}, row.nbytes


def _read_pair(source: Source) -> Iterator[tuple[int, Any, int]]:
    """`NAME_prefix.npy` and `NAME_suffix.npy` (lm-extraction-benchmark)."""
    first = Path(source.path)
    second = _second_half(first)
    if not second.is_file():
        raise _Unusable(f"{second.name} must lie beside it")
    prefix, suffix = _array(first), _array(second)
    if len(prefix) != len(suffix):
        raise _Unusable(f"it has {len(prefix)} rows and {second.name} {len(suffix)}")
    for number, (a, b) in enumerate(zip(prefix, suffix, strict=True), start=1):
        yield number, {"prefix_ids": a, "suffix_ids": b}, a.nbytes + b.nbytes


def _array(path: Path) -> Any:
    import numpy as np

    with _damage():
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise _Unusable(f"{path.name} must hold integer ids [paragraph, pos]")
    return np.asarray(ids)


def _read_pt(source: Source) -> Iterator[tuple[int, Any, int]]:
    import torch

    with _damage("not a plain tensor file, and nothing in it was run"):
        ids = torch.load(source.path, map_location="cpu", weights_only=True)
    integer = isinstance(ids, torch.Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.is_quantized
    )
    if not integer or ids.ndim != 2 or ids.layout != torch.strided:
        raise _Unusable("it must hold an integer tensor [paragraph, pos]")
    for number, row in enumerate(ids.detach().numpy(), start=1):
        yield number, {"ids": row}, row.nbytes


def _read_dataset(source: Source) -> Iterator[tuple[int, Any, int]]:
    number = 0
    with _damage():
        for record in _dataset(*source.path.removeprefix("hf:").split(":")):
            number += 1
            yield number, record, _size(record)


def _dataset(name: str, split: str | None = None, config: str | None = None, *more: str) -> Any:
    if more:
        raise _Unusable("its name is hf:NAME[@REVISION][:SPLIT[:CONFIG]]")
    try:
        import datasets
    except ImportError:
        raise _Unusable("install the package datasets to read it") from None
    if not _is_saved_dataset(Path(name)):
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
            raise _Unusable(f"name one of its splits ({', '.join(splits)}): hf:FOLDER:SPLIT")
        return found[split]
    return found


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


# -- shared -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _damage(what: str = "it cannot be read") -> Iterator[None]:
    """Whatever a library raises while it parses a file is a problem of the file."""
    try:
        yield
    except (_Unusable, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _Unusable(f"{what} ({reason[:200]})") from None


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSION:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in ("jsonl", "csv", "txt") else None
    if path.name.endswith("_prefix.npy"):
        return "pair"
    return _KINDS.get(path.suffix)


def content_files(source: Source) -> list[Path]:
    """The files on this machine that hold a source's content; none for a dataset on the hub.

    Of a saved dataset those that describe it: `datasets` keeps a fingerprint of the content there.
    """
    if source.kind == "hf":
        folder = Path(source.path.removeprefix("hf:").split(":")[0])
        return sorted(folder.rglob("state.json")) if _is_saved_dataset(folder) else []
    path = Path(source.path)
    return [path, _second_half(path)] if source.kind == "pair" else [path]


def _second_half(path: Path) -> Path:
    return path.with_name(path.name.removesuffix("_prefix.npy") + "_suffix.npy")


def _is_second_half(path: Path) -> bool:
    first = path.with_name(path.name.removesuffix("_suffix.npy") + "_prefix.npy")
    return path.name.endswith("_suffix.npy") and first.is_file()


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


_Read = Callable[[Source], Iterable[tuple[int, Any, int]]]
_Decode = Callable[[Any], dict[str, Any]]


def _as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    return record


FORMATS: dict[str, tuple[_Read, _Decode]] = {
    "jsonl": (_read_jsonl, _decode_json),
    "csv": (_read_csv, _decode_csv),
    "txt": (_read_txt, _decode_txt),
    "parquet": (_read_parquet, _as_it_is),
    "npy": (_read_npy, _as_it_is),
    "pair": (_read_pair, _as_it_is),
    "pt": (_read_pt, _as_it_is),
    "hf": (_read_dataset, _as_it_is),
}
_KINDS = {f".{kind}": kind for kind in ("jsonl", "csv", "txt", "parquet", "npy", "pt")}
_ENDINGS = ".jsonl, .csv, .txt (each also .gz or .zst), .parquet, .npy, .pt"
