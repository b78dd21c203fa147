"""Malformed files of paragraphs: each is read, or refused by one clear error."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from tests.helpers import models as zoo
from tests.helpers.fuzz import COUNTS, jsonl, only_input_errors, spoil

pytestmark = pytest.mark.any_version


def written_by(write: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    """The bytes of a file that a library writes."""

    def content(path: Path) -> bytes:
        write(path)
        return path.read_bytes()

    return content


IDS = zoo.random_ids(4, 24)
TEXTS = [" ".join(f"<{i}>" for i in row) for row in IDS.tolist()]
FORMATS: dict[str, Callable[[Path], bytes]] = {
    "ids.jsonl": lambda path: jsonl([{"id": i, "ids": r} for i, r in enumerate(IDS.tolist())]),
    "text.jsonl": lambda path: jsonl([{"text": text, "source": "é"} for text in TEXTS]),
    "halves.jsonl": lambda path: jsonl(
        [{"prefix_ids": row[:10], "suffix_ids": row[10:]} for row in IDS.tolist()]
    ),
    "packed.jsonl.gz": lambda path: gzip.compress(jsonl([{"ids": r} for r in IDS.tolist()])),
    "packed.jsonl.zst": written_by(lambda path: _zstd(path, jsonl([{"text": t} for t in TEXTS]))),
    "table.csv": lambda path: pd.DataFrame({"text": TEXTS, "n": 1}).to_csv().encode(),
    "plain.txt": lambda path: "\n\n".join(TEXTS).encode(),
    "table.parquet": written_by(lambda path: pd.DataFrame({"ids": IDS.tolist()}).to_parquet(path)),
    "array.npy": written_by(lambda path: np.save(path, IDS.numpy())),
    "tensor.pt": written_by(lambda path: torch.save(IDS, path)),
    "array.json": lambda path: json.dumps(
        [{"id": i, "ids": row} for i, row in enumerate(IDS.tolist())], indent=1
    ).encode(),
    "nested.json": lambda path: json.dumps({"n": 1, "data": [{"text": t} for t in TEXTS]}).encode(),
    "padded.jsonl": lambda path: jsonl(
        [
            {"input_ids": [*r, 0, 0], "attention_mask": [1] * 24 + [0, 0], "labels": [*r, -100, 0]}
            for r in IDS.tolist()
        ]
    ),
    "pairs.ndjson": lambda path: jsonl(
        [{"prompt": t[: len(t) // 2], "completion": t[len(t) // 2 :]} for t in TEXTS]
    ),
    "table.tsv": lambda path: pd.DataFrame({"text": TEXTS, "n": 1}).to_csv(sep="\t").encode(),
    "wide.txt": lambda path: "\r\n\r\n".join(TEXTS).encode("utf-16"),
    "packed.jsonl.xz": lambda path: lzma.compress(jsonl([{"ids": r} for r in IDS.tolist()])),
    "table.arrow": written_by(lambda path: _arrow(path)),
    "table.feather": written_by(lambda path: pd.DataFrame({"text": TEXTS}).to_feather(path)),
    "arrays.npz": written_by(
        lambda path: np.savez(path, prefix=IDS[:, :10].numpy(), suffix=IDS[:, 10:].numpy())
    ),
    "batch.pt": written_by(
        lambda path: torch.save({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, path)
    ),
    "half_prefix.npy": written_by(
        lambda path: (
            np.save(path, IDS[:, :10].numpy()),
            np.save(path.with_name("half_suffix.npy"), IDS[:, 10:].numpy()),
        )
    ),
}


def _zstd(path: Path, raw: bytes) -> None:
    import pyarrow as pa

    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(raw)


def _arrow(path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": TEXTS, "when": pa.array(range(4), pa.timestamp("us"))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def read(path: Path) -> mc.Paragraphs:
    return mc.Paragraphs.read(path, zoo.tokenizer(), n_prefix=10, n_continuation=12)


@pytest.mark.parametrize("name", FORMATS)
def test_spoiled_files(tmp_path, name):
    path = tmp_path / name
    raw = FORMATS[name](path)
    path.write_bytes(raw)
    assert len(read(path)) == len(IDS)
    draw = random.Random(name)
    outcomes = set()
    for _ in range(COUNTS["spoiled files"]):
        spoiled = spoil(raw, draw)
        path.write_bytes(spoiled)
        with only_input_errors("spoiled files", (name, spoiled)):
            outcomes.add("error")
            assert isinstance(read(path), mc.Paragraphs)
            outcomes.add("read")
    assert "error" in outcomes


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 101, 2**31, 2**63, 2**200, 1.5, float("nan"), float("inf"), "", "x",
    "\ud800", "\0", [], {}, [1], ["1"] * 22, [1.0] * 22, [True] * 22, [-1] * 22, [2**40] * 22,
    [None] * 22, [[1]] * 22, {"a": 1}, [1] * 21, [1] * 22, "<1> " * 21, "<1> " * 22, "\u2028" * 30,
    "é" * 99,
)  # fmt: skip


def test_odd_records(tmp_path):
    draw = random.Random(1)
    path = tmp_path / "odd.jsonl"
    names = (
        "ids",
        "tokens",
        "text",
        "paragraph",
        "prefix_ids",
        "suffix_ids",
        "prompt",
        "completion",
        "attention_mask",
        "labels",
        "id",
        "index",
        "x",
        "",
    )
    for turn in range(COUNTS["odd records"]):
        records: list[Any] = [{"ids": [1] * 24}] if turn % 3 else []
        for _ in range(draw.randrange(1, 4)):
            keys = draw.sample(names, draw.randrange(1, 4))
            records.append({key: draw.choice(ODD) for key in keys})
        if turn % 10 == 0:
            records.append(draw.choice(ODD))
        path.write_bytes(jsonl(records))
        with only_input_errors("odd records", records):
            assert all(isinstance(name, str) for name in read(path).names)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\n\n", b"[" * 100_000, b'{"ids":' * 10_000, b'{"ids": [' + b"1," * 50 + b"]}",
        b"\xff\xfe" * 10, b"\xef\xbb\xbf", b"null", b"{}", b'{"ids": null}', b'"ids"', b"1" * 5000,
        b'{"ids": [' + b"9" * 5000 + b"]}", b'{"text": "' + b"a " * 10**6 + b'"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "ending",
    [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".npy", ".npz", ".pt", ""],
)
def test_strange_files(tmp_path, raw, ending):
    path = tmp_path / f"strange{ending}"
    path.write_bytes(raw)
    paragraphs = None
    with only_input_errors("strange files", (ending, raw[:100])):
        paragraphs = read(path)
    assert path.read_bytes() == raw
    if paragraphs is not None:  # what is accepted can be used as it is
        assert len(paragraphs) > 0
        assert paragraphs.ids.shape[1] == 22
        assert 0 <= int(paragraphs.ids.min()) <= int(paragraphs.ids.max()) < zoo.D_VOCAB


@pytest.mark.parametrize(
    "name", ["", ".", "..", "missing.jsonl", "a\0b.jsonl", "x" * 300 + ".pt", "x.exe"]
)
def test_paths_that_are_no_files(tmp_path, name):
    with only_input_errors("strange files", name), pytest.raises(InputError):
        read(tmp_path / name)
