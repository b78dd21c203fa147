"""Every file format gives the same ids; every common fault of a file gives a clear answer."""

import csv
import gzip
import io
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import memcircuits as mc
from memcircuits.data.formats.listing import find_sources
from memcircuits.data.formats.records import LIMIT, BadRow, Row
from memcircuits.data.formats.sources import read_chunks, read_rows
from tests.helpers import models as zoo

IDS = zoo.random_ids(5, 24)
LENGTHS = {"n_prefix": 10, "n_continuation": 12}


def text_of(ids):
    return " ".join(f"<{i}>" for i in ids.tolist())


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def csv_of(texts):
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["paragraph", "id", "count"])
    writer.writerows([t.replace(" ", "\n", 1), f"p{i}", 2**i] for i, t in enumerate(texts))
    return out.getvalue().encode()


def parquet_of(**columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=2)
    return sink.getvalue()


def npy_of(array):
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def pt_of(value):
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


TEXTS = [text_of(row) for row in IDS]
BY_TEXT = lines({"text": t} for t in TEXTS)
BY_IDS = lines({"ids": row} for row in IDS.tolist())
FORMATS = {
    "ids.jsonl": BY_IDS,
    "bom.jsonl": b"\xef\xbb\xbf" + BY_IDS.replace(b"\n", b"\r\n\r\n"),
    "text.jsonl": BY_TEXT,
    "text.jsonl.gz": gzip.compress(BY_TEXT),
    "text.jsonl.zst": zstd(BY_TEXT),
    "two-frames.jsonl.zst": zstd(BY_TEXT[: BY_TEXT.index(b"\n") + 1])
    + zstd(BY_TEXT[BY_TEXT.index(b"\n") + 1 :]),
    "olmo.jsonl": lines({"prefix_ids": row[:10], "suffix_ids": row[10:]} for row in IDS.tolist()),
    "text.csv": csv_of(TEXTS),
    "text.txt": "\n\n\n".join(t.replace(" ", "\n", 1) for t in TEXTS).encode(),
    "text.parquet": parquet_of(text=TEXTS),
    "tokens.parquet": parquet_of(tokens=IDS.tolist(), index=range(5)),
    "ids.npy": npy_of(IDS.numpy().astype(np.uint16)),
    "ids.pt": pt_of(IDS),
    "ids32.pt": pt_of(IDS.int()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_ids(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    paragraphs = mc.Paragraphs.read(tmp_path / name, zoo.tokenizer(), **LENGTHS)
    assert torch.equal(paragraphs.ids, IDS[:, :22])
    assert paragraphs.n_prefix == 10


def test_pairs_of_arrays_are_joined_where_they_meet(tmp_path):
    np.save(tmp_path / "train_prefix.npy", IDS[:, :14].numpy().astype(np.uint16))
    np.save(tmp_path / "train_suffix.npy", IDS[:, 14:].numpy().astype(np.uint16))
    paragraphs = mc.Paragraphs.read(tmp_path / "train_prefix.npy", n_prefix=10, n_continuation=8)
    # The last 10 of the prefix, and the first 8 after it.
    assert torch.equal(paragraphs.ids, IDS[:, 4:22])
    folder = mc.Paragraphs.read(tmp_path, n_prefix=10, n_continuation=8)
    assert torch.equal(folder.ids, paragraphs.ids)
    with pytest.raises(mc.InputError, match="n_prefix=14"):
        mc.Paragraphs.read(tmp_path / "train_prefix.npy", n_prefix=15, n_continuation=8)
    (tmp_path / "train_suffix.npy").unlink()
    with pytest.raises(mc.InputError, match=r"train_suffix.npy must lie beside it"):
        mc.Paragraphs.read(tmp_path / "train_prefix.npy", **LENGTHS)


def test_saved_datasets_and_datasets_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TEXTS, "source": ["x"] * 5})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": table, "b": table.select([1])}).save_to_disk(tmp_path / "two")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(BY_TEXT)
    for name in (tmp_path / "one", f"hf:{tmp_path / 'two'}:a", f"hf:{folder}:train"):
        paragraphs = mc.Paragraphs.read(name, zoo.tokenizer(), **LENGTHS)
        assert torch.equal(paragraphs.ids, IDS[:, :22])
    assert len(mc.Paragraphs.read(f"hf:{tmp_path / 'two'}:b", zoo.tokenizer(), **LENGTHS)) == 1
    with pytest.raises(mc.InputError, match=r"\(a, b\)"):
        mc.Paragraphs.read(tmp_path / "two", zoo.tokenizer(), **LENGTHS)
    with pytest.raises(mc.InputError, match="cannot be read"):
        mc.Paragraphs.read("hf:nobody/has-this", zoo.tokenizer(), **LENGTHS)


def test_other_columns_become_metadata_and_ids_names(tmp_path):
    (tmp_path / "a.csv").write_text(
        'id,text,count,nll,code\n7,"<1> <2> ""<3>",8,0.5,007\nx,<4> <5> <6>,9,1e3,1e999\n'
    )
    paragraphs = mc.Paragraphs.read(
        tmp_path / "a.csv", zoo.tokenizer(), n_prefix=1, n_continuation=2
    )
    assert paragraphs.names == ("7", "x")
    assert paragraphs.metadata == {"count": (8, 9), "nll": (0.5, 1000.0), "code": ("007", "1e999")}
    (tmp_path / "b.jsonl").write_bytes(
        lines([{"index": 3, "tokens": [1, 2, 3], "text": "shown", "odd": "\ud800", "x": [1]}])
    )
    paragraphs = mc.Paragraphs.read(tmp_path / "b.jsonl", n_prefix=1, n_continuation=2)
    assert paragraphs.names == ("3",)
    assert paragraphs.metadata == {"index": (3,), "odd": ("\\ud800",), "x": ([1],)}


def test_datasets_on_the_hub_are_streamed_at_the_revision_asked_for(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return iter([{"ids": row} for row in IDS.tolist()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    for name in ("org/set@abc:train:en", "org/set"):
        assert torch.equal(mc.Paragraphs.read(f"hf:{name}", **LENGTHS).ids, IDS[:, :22])
    assert asked == [
        ("org/set", "en", {"split": "train", "revision": "abc", "streaming": True}),
        ("org/set", None, {"split": "train", "revision": None, "streaming": True}),
    ]
    with pytest.raises(mc.InputError, match="its name is hf:NAME"):
        mc.Paragraphs.read("hf:a:b:c:d", **LENGTHS)


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, row in (("b.jsonl", 1), ("deep/a.jsonl.gz", 2), ("a.txt", 0), ("notes.md", 3)):
        is_text = name in ("a.txt", "notes.md")
        content = TEXTS[row].encode() if is_text else lines([{"text": TEXTS[row]}])
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    (tmp_path / ".hidden.jsonl").write_bytes(BY_TEXT)
    paragraphs = mc.Paragraphs.read(tmp_path, zoo.tokenizer(), **LENGTHS)
    assert paragraphs.names == ("a", "b-00001", "deep/a-00001")
    assert torch.equal(paragraphs.ids, IDS[:3, :22])


GZ, PARQUET = gzip.compress(BY_TEXT), FORMATS["text.parquet"]
LONG = lines([{"ids": list(range(30))}])
FAULTS = {
    "missing": ("a.jsonl", None, "no such file"),
    "unknown ending": ("a.docx", b"\0\1\2\3x", "known endings"),
    "compressed parquet": ("a.parquet.gz", gzip.compress(PARQUET), "compressed as a whole"),
    "empty jsonl": ("a.jsonl", b"", "a.jsonl is empty"),
    "blank lines": ("a.txt", b"\n \n\n", "a.txt is empty"),
    "empty gz": ("a.jsonl.gz", b"", "a.jsonl.gz is empty"),
    "empty csv": ("a.csv", b"", "a.csv is empty"),
    "only a header": ("a.csv", b"text\n", "a.csv is empty"),
    "no rows": ("a.npy", npy_of(np.zeros((0, 30), np.int64)), "a.npy is empty"),
    "empty parquet file": ("a.parquet", b"", "cannot be read"),
    "empty pt": ("a.pt", b"", "nothing in it was run"),
    "truncated gz": ("a.jsonl.gz", GZ[: len(GZ) // 2], "cannot be read"),
    "truncated zst": ("a.jsonl.zst", zstd(BY_TEXT)[:-9], "cannot be read"),
    "damaged zst": ("a.txt.zst", zstd(BY_TEXT)[:4] + BY_TEXT, "cannot be read"),
    "truncated parquet": ("a.parquet", PARQUET[:-20], "cannot be read"),
    "damaged parquet": ("a.parquet", PARQUET[:40] + b"\xff" * 40 + PARQUET[80:], "cannot be read"),
    "truncated npy": ("a.npy", npy_of(IDS.numpy())[:-8], "cannot be read"),
    "truncated pt": ("a.pt", pt_of(IDS)[:-30], "nothing in it was run"),
    "truncated json": ("a.jsonl", LONG[:-4], "line 1; not JSON"),
    "half a zip": ("a.pt", b"PK\x03\x04" + b"\0" * 40, "nothing in it was run"),
    "wrong columns": ("a.jsonl", lines([{"body": "x"}]), "its columns are body; it needs one of"),
    "wrong csv columns": ("a.csv", b"a,b\n1,2\n", "its columns are a, b; it needs"),
    "wrong parquet columns": ("a.parquet", parquet_of(body=["x"]), "its columns are body"),
    "no record": ("a.jsonl", b"7\n", "give a JSON object, a text or a list of token ids"),
    "deep json": ("a.jsonl", b"[" * 100_000 + b"\n", "not JSON"),
    "deep column": (
        "a.jsonl",
        b'{"ids": [1], "x": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        "nested too deeply",
    ),
    "long number": ("a.jsonl", b'{"ids": [' + b"9" * 5000 + b"]}\n", "not JSON"),
    "not utf-8": ("a.jsonl", b'{"text": "\xff\xfe"}\n', "line 1; not UTF-8"),
    "half of utf-16": ("a.txt", "some words".encode("utf-16")[:-1], "cannot be read"),
    "latin-1": ("a.txt", "café ".encode("latin-1") * 30, "iconv -f latin1 -t utf8"),
    "csv not utf-8": ("a.csv", b"text\ncaf\xe9\n", "line 2; text is not UTF-8"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n', "text is not UTF-8"),
    "fields": ("a.csv", b"text,b\n<1>,2,3\n", "3 fields where the header has 2"),
    "open quote": ("a.csv", b'text\n"<1>\n', "not CSV"),
    "text is a number": ("a.jsonl", b'{"text": 7}\n', "text must be a string"),
    "text is null": ("a.parquet", parquet_of(text=pa.array([None], pa.string())), "must be a str"),
    "ids are strings": ("a.jsonl", lines([{"ids": ["1"]}]), "list of token ids"),
    "ids are a string": ("a.csv", b"ids\n[1 2]\n", "list of token ids"),
    "ids are floats": ("a.parquet", parquet_of(ids=[[1.0, 2.0]]), "list of token ids"),
    "ids are booleans": ("a.jsonl", lines([{"ids": [True]}]), "list of token ids"),
    "ids are negative": ("a.npy", npy_of(np.full((1, 30), -1)), "list of token ids"),
    "ids are huge": ("a.jsonl", lines([{"ids": [2**63] * 30}]), "list of token ids"),
    "half a pair": ("a.jsonl", lines([{"prefix_ids": [1], "suffix_ids": 2}]), "suffix_ids must"),
    "float array": ("a.npy", npy_of(np.zeros((2, 30))), "integer ids"),
    "flat array": ("a.npy", npy_of(np.zeros(30, np.int64)), "integer ids"),
    "object array": ("a.npy", npy_of(np.array([{}], dtype=object)), "integer ids"),
    "float tensor": ("a.pt", pt_of(torch.zeros(2, 30)), "integer ids"),
    "boolean tensor": ("a.pt", pt_of(torch.zeros(2, 30).bool()), "integer ids"),
    "flat tensor": ("a.pt", pt_of(torch.zeros(30).long()), "integer ids"),
    "dictionary": ("a.pt", pt_of({"weight": torch.zeros(2)}), "its arrays are weight (2,)"),
    "mixed lengths": ("a.jsonl", LONG + lines([{"ids": [1, 2, 3]}]), "line 2; it has 3 tokens"),
    "no ids": ("a.jsonl", lines([{"ids": []}]), "line 1; it has 0 tokens"),
    "short text": ("a.txt", b"<1> <2>\n", "line 1; it has 2 tokens, 22 are needed"),
    "empty folder": ("folder/a.md", b"x", "it holds no"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_never_a_traceback(tmp_path, fault):
    name, content, says = FAULTS[fault]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    target = path.parent if name.startswith("folder") else path
    with pytest.raises(mc.InputError) as caught:
        mc.Paragraphs.read(target, zoo.tokenizer(), **LENGTHS)
    assert says in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_nothing_in_a_pickle_is_run(tmp_path):
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (ran,))

    (tmp_path / "a.pt").write_bytes(pt_of(Harmful()))
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harmful()))
    np.save(tmp_path / "c.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    for name in ("a.pt", "b.pt", "c.npy"):
        with pytest.raises(mc.InputError):
            mc.Paragraphs.read(tmp_path / name, **LENGTHS)
    assert not ran.exists()


def test_text_needs_a_model(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    with pytest.raises(mc.InputError, match="pass the model"):
        mc.Paragraphs.read(tmp_path / "a.txt", **LENGTHS)


def test_bad_rows_are_passed_over_and_the_others_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BY_IDS.replace(b"\n", b"\nnonsense\n", 2))
    rows = list(read_rows(find_sources(path)[0]))
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False, True] + [False] * 3
    assert [row.ids for row in rows if isinstance(row, Row)] == IDS.tolist()
    assert rows[1].where == "a.jsonl, line 2"


def test_empty_files_are_named_and_do_not_spoil_a_folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    (tmp_path / "b.jsonl").write_bytes(BY_IDS)
    assert list(read_rows(find_sources(tmp_path)[0])) == [BadRow("a.jsonl", "it is empty")]
    assert torch.equal(mc.Paragraphs.read(tmp_path, **LENGTHS).ids, IDS[:, :22])


def test_strings_of_parquet_files_that_are_no_utf8_spoil_their_row_alone(tmp_path):
    words = [b"<1> <2> <3>", b"\xff\xfe", b"<4> <5> <6>"]
    offsets = np.cumsum([0, *map(len, words)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(words))]
    column = pa.Array.from_buffers(pa.string(), 3, buffers)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    rows = list(read_rows(find_sources(tmp_path / "a.parquet")[0]))
    assert [row.where for row in rows] == [f"a.parquet, row {i}" for i in (1, 2, 3)]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert "not UTF-8" in rows[1].reason
    assert rows[2].text == "<4> <5> <6>"


def test_rows_before_damage_are_kept(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    plain = lines({"ids": row} for row in zoo.random_ids(5000, 30).tolist())
    path.write_bytes(gzip.compress(plain)[:-2000])
    rows = list(read_rows(find_sources(path)[0]))
    assert len(rows) > 1000
    assert all(isinstance(row, Row) for row in rows[:-1])
    assert rows[-1].where == f"a.jsonl.gz, after line {len(rows) - 1}"


@pytest.mark.parametrize(
    ("name", "n_bytes"), [("a.jsonl", 2**30), ("a.txt", 2**27), ("a.csv", 2**27)]
)
def test_a_line_of_a_gigabyte_takes_no_memory(tmp_path, name, n_bytes):
    good = {"a.jsonl": BY_IDS, "a.txt": TEXTS[0].encode() + b"\n\n", "a.csv": b"text\n<1>\n"}[name]
    with open(tmp_path / name, "wb") as file:
        file.write(good)
        file.seek(n_bytes, os.SEEK_CUR)  # a hole: it takes no room on disk
        file.write(b"\n" + good)
    source = find_sources(tmp_path / name)[0]
    tracemalloc.start()
    rows = list(read_rows(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * LIMIT
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(bad) == 1
    assert "longer than 16 MiB" in bad[0].reason
    n_good = {"a.jsonl": 10, "a.txt": 1, "a.csv": 1}[name]  # txt: the last block is one with it
    assert len(rows) == n_good + 1


def test_chunks_depend_on_the_file_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"ids": [1] * n} for n in (10, 10, 10, 2000, 10)))
    chunks = list(read_chunks(find_sources(path)[0], 2))
    # Two rows, or two KiB: the long row stands alone.
    assert [[number for number, _ in chunk.raw] for chunk in chunks] == [[1, 2], [3], [4], [5]]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
