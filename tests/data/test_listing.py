"""Folders: what is read, and what is passed over with its reason."""

import gzip
import os
import threading

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.data.formats.listing import find_sources, list_files
from memcircuits.data.formats.records import BadRow
from memcircuits.data.formats.sources import read_chunks, read_rows
from tests.data.test_formats import BY_TEXT, IDS, LENGTHS, TEXTS, lines, npy_of, parquet_of
from tests.helpers import models as zoo


def test_a_folder_says_what_it_passed_over(tmp_path):
    for i in range(3):
        shard = gzip.compress(lines([{"text": TEXTS[i]}]))
        (tmp_path / f"c4-train.{i:05d}-of-00003.json.gz").write_bytes(shard)
    other = {
        "LICENSE.txt": b"words " * 99,
        "README.md": b"# data",
        "dataset_infos.json": b'{"features": []}',
        "sizes.csv": b"name,bytes\na,1\n",
        "table.parquet": parquet_of(url=["x"]),
        "book.pdf": b"%PDF-1.7",
        "empty": b"",
        ".gitattributes": b"x",
        ".cache/a.jsonl": BY_TEXT,
    }
    for name, content in other.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "z-link.json.gz").symlink_to(tmp_path / "c4-train.00000-of-00003.json.gz")
    (tmp_path / "z-nothing.jsonl").symlink_to(tmp_path / "missing")
    (tmp_path / "z-round").symlink_to(tmp_path)
    listing = list_files(tmp_path)
    assert [source.name[:14] for source in listing.sources] == [
        f"c4-train.{i:05d}" for i in range(3)
    ]
    reasons = {file.where: file.reason for file in listing.passed_over}
    assert reasons.keys() == {
        *other.keys() - {".cache/a.jsonl"}, ".cache", "z-link.json.gz", "z-nothing.jsonl", "z-round"
    }  # fmt: skip
    for name, says in {
        "LICENSE.txt": "about the data",
        "README.md": "ending is not .txt",
        "sizes.csv": "its columns are name, bytes",
        "table.parquet": "its columns are url",
        "book.pdf": "it is a PDF",
        ".cache": "hidden",
        "z-link.json.gz": "another name of a file that is read",
        "z-nothing.jsonl": "a link to nothing",
        "z-round": "a link to a folder",
    }.items():
        assert says in reasons[name]
    paragraphs = mc.Paragraphs.read(tmp_path, zoo.tokenizer(), **LENGTHS)
    assert torch.equal(paragraphs.ids, IDS[:3, :22])
    assert paragraphs.notes[0].startswith("3 files were read: c4-train.00000-of-00003.json.gz, ")
    assert "and 7 more" in paragraphs.notes[1]


def test_a_folder_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("words")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(mc.InputError, match=r"LICENSE.txt \(about the data\), a.csv \(its colu"):
        mc.Paragraphs.read(tmp_path, zoo.tokenizer(), **LENGTHS)


def test_the_files_of_lm_extraction_benchmark(tmp_path):
    parts = {"preprefix": IDS[:, :4], "prefix": IDS[:, 4:14], "suffix": IDS[:, 14:]}
    for name, ids in {**parts, "dataset": IDS}.items():
        (tmp_path / f"train_{name}.npy").write_bytes(npy_of(ids.numpy().astype(np.uint16)))
    for path in (tmp_path, tmp_path / "train_prefix.npy", tmp_path / "train_suffix.npy"):
        paragraphs = mc.Paragraphs.read(path, n_prefix=10, n_continuation=10)
        assert torch.equal(paragraphs.ids, IDS[:, 4:24])
    assert [file.where for file in list_files(tmp_path).passed_over] == [
        "train_dataset.npy",
        "train_preprefix.npy",
    ]
    torch.save(parts["prefix"], tmp_path / "prefix.pt")
    torch.save(parts["suffix"], tmp_path / "suffix.pt")
    pair = mc.Paragraphs.read(tmp_path / "prefix.pt", n_prefix=10, n_continuation=10)
    assert torch.equal(pair.ids, IDS[:, 4:24])


@pytest.mark.parametrize("name", ["a.jsonl", "a.npy", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("change", ["cut", "appended", "replaced"])
def test_a_file_that_changes_while_it_is_read(tmp_path, name, change):
    """Nothing is mapped into memory: cutting a mapped file would end the process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, ids = tmp_path / name, zoo.random_ids(3000, 1024)
    table = pa.table({"ids": list(ids.numpy())})
    if name == "a.jsonl":
        path.write_bytes(lines({"ids": row} for row in ids[:500].tolist()))
    elif name == "a.npy":
        np.save(path, ids.numpy())
    elif name == "a.parquet":
        pq.write_table(table, path, row_group_size=100)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    chunks = read_chunks(find_sources(path)[0], 100)
    rows = list(next(chunks).rows())
    if change == "cut":
        os.truncate(path, path.stat().st_size // 3)
    elif change == "appended":
        with path.open("ab") as file:
            file.write(b"\n{}")
    else:
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
    rows += [row for chunk in chunks for row in chunk.rows()]
    assert isinstance(rows[-1], BadRow)
    assert rows[-1].unread
    assert "it changed while it was read" in rows[-1].reason


def test_a_named_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").write_bytes(BY_TEXT)
    listing: list = []
    worker = threading.Thread(target=lambda: listing.append(list_files(tmp_path)), daemon=True)
    worker.start()
    worker.join(20)
    assert listing[0].passed_over == [BadRow("pipe.jsonl", "not a file")]
    assert len(list(read_rows(listing[0].sources[0]))) == 5
