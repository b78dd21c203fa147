"""Names are unique, columns are those of all records, and values of any type survive."""

import datetime
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import memcircuits as mc
from memcircuits.commands.output import records
from memcircuits.data.metadata import columns_of, unique_names
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.measure.scanning import Scan
from tests.helpers import models as zoo

LENGTHS = {"n_prefix": 2, "n_continuation": 2}


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        (["a", "b"], ("a", "b")),
        (["a", "a", "a"], ("a", "a#2", "a#3")),
        (["a", "a", "a#2"], ("a", "a#3", "a#2")),
        (["a#2", "a", "a", "a#2"], ("a#2", "a", "a#3", "a#2#2")),
        ([], ()),
    ],
)
def test_repeated_names_are_numbered(names, unique):
    assert unique_names(names) == unique


def test_many_repeated_names_stay_unique():
    draw = np.random.default_rng(0)
    names = [
        f"{'ab'[draw.integers(2)]}#{draw.integers(4)}"[: draw.integers(1, 4)] for _ in range(300)
    ]
    unique = unique_names(names)
    assert len(set(unique)) == 300
    assert all(new.startswith(name) for new, name in zip(unique, names, strict=True))


def test_every_paragraph_has_a_name_of_its_own(tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"id": "doc1", "ids": [1, 2, 3, 4]}) + "\n")
    paragraphs = mc.Paragraphs.read(path, **LENGTHS)
    assert (paragraphs + paragraphs).names == ("doc1", "doc1#2")
    path.write_text(path.read_text() * 3)
    assert mc.Paragraphs.read(path, **LENGTHS).names == ("doc1", "doc1#2", "doc1#3")
    assert paragraphs[[0, 0]].names == ("doc1", "doc1#2")


def test_columns_are_those_of_all_records(tmp_path):
    assert columns_of([{"b": 1}, {"a": 2, "b": None}, {}]) == {
        "b": (1, None, None),
        "a": (None, 2, None),
    }
    path = tmp_path / "docs.jsonl"
    path.write_text(
        '{"id": "first", "ids": [464, 2068, 758, 2183]}\n'
        '{"id": "second", "ids": [464, 2068, 758, 2183], "repetitions": 3}\n'
    )
    assert mc.Paragraphs.read(path, **LENGTHS).metadata == {"repetitions": (None, 3)}


RICH = {
    "when": pa.array([datetime.datetime(2019, 4, 25, 12, 57, 54, 5)], pa.timestamp("us")),
    "nanoseconds": pa.array([1], pa.timestamp("ns", "UTC")),
    "price": pa.array([Decimal("1.50")], pa.decimal128(5, 2)),
    "raw": pa.array([b"\xff\x00"]),
    "list": pa.array([[1, None]]),
    "struct": pa.array([{"a": {"b": [1.5]}}]),
    "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    "day": pa.array([datetime.date(2020, 1, 1)]),
    "long": pa.array([datetime.timedelta(days=1)]),
    "kind": pa.array(["x"]).dictionary_encode(),
    "nothing": pa.nulls(1),
}


def test_metadata_of_any_type_survives_saving_and_reports(tmp_path, neo):
    ids = pa.array([zoo.random_ids(1, 22)[0].tolist()])
    pq.write_table(pa.table({"ids": ids, **RICH}), tmp_path / "rich.parquet")
    paragraphs = mc.Paragraphs.read(tmp_path / "rich.parquet", n_prefix=10, n_continuation=12)
    assert set(paragraphs.metadata) == set(RICH)
    tensors = {"tensor": (torch.tensor([1, 2]),), "scalar": (np.float32(0.5),), "set": ({1},)}
    paragraphs = mc.Paragraphs(
        paragraphs.ids, 10, paragraphs.names, {**paragraphs.metadata, **tensors, "f": (len,)}
    )
    scan = mc.scan(neo, paragraphs, progress=False)
    saved = Scan.load(scan.save(tmp_path / "scan.safetensors"))
    for name in (*RICH, "scalar", "set"):
        expected = paragraphs.metadata[name][0]
        expected = [list(v) for v in expected] if name == "map" else expected  # JSON has no tuples
        assert saved.metadata[name][0] == expected, name
    assert torch.equal(saved.metadata["tensor"][0], torch.tensor([1, 2]))
    assert list(saved.metadata["f"]) == [str(len)]
    printed = records(saved.to_frame())
    json.dumps(printed, allow_nan=False)
    assert printed[0]["when"].startswith("2019-04-25T12:57:54")
    assert printed[0]["tensor"] == [1, 2]
    assert saved._repr_html_()
    assert saved.figure()


def test_metadata_of_any_type_survives_a_scan_to_disk(tmp_path, neo):
    ids = pa.array([row.tolist() for row in zoo.random_ids(2, 22)])
    rich = {name: pa.concat_arrays([column, column]) for name, column in RICH.items()}
    pq.write_table(pa.table({"ids": ids, **rich}), tmp_path / "rich.parquet")
    windows = Windows(n_prefix=10, n_continuation=12)
    folder = scan_to_disk(
        neo, tmp_path / "rich.parquet", tmp_path / "out", windows=windows, progress=False
    )
    frame = folder.to_frame()
    assert frame["price"].tolist() == [Decimal("1.50")] * 2
    assert frame["raw"].tolist() == [b"\xff\x00"] * 2
    assert frame["struct"].tolist() == [{"a": {"b": [1.5]}}] * 2
    assert frame["when"][0] == datetime.datetime(2019, 4, 25, 12, 57, 54, 5)
