"""A file is read for what it holds, whatever its name: every layout gives the same ids."""

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
import torch

import memcircuits as mc
from memcircuits.data.formats.listing import find_sources
from tests.data.test_formats import (
    BY_IDS,
    BY_TEXT,
    FORMATS,
    IDS,
    LENGTHS,
    TEXTS,
    csv_of,
    lines,
    npy_of,
    parquet_of,
    pt_of,
    zstd,
)
from tests.helpers import models as zoo

RECORDS = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
PRETTY = json.dumps(RECORDS, indent=2).encode()
HALVES = {"prefix": IDS[:, :10].numpy(), "suffix": IDS[:, 10:].numpy()}


def arrow_of(opener, **columns):
    table = pa.table(columns)
    sink = io.BytesIO()
    with opener(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def feather_of(table):
    sink = io.BytesIO()
    pa.feather.write_feather(table, sink)
    return sink.getvalue()


def npz_of(**arrays):
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


def padded(fill, length=40):
    array = np.full((5, length), fill)
    for row, ids in enumerate(IDS.numpy()):
        array[row, : 24 - row % 3] = ids[: 24 - row % 3]
    return array


def table_of(separator, quote='"'):
    frame = pd.DataFrame({"Id": range(5), "Text": [f'{text} say "hi", x' for text in TEXTS]})
    return frame.to_csv(sep=separator, index=False, quotechar=quote).encode()


LAYOUTS = {
    "upper case": ("A.JSONL.GZ", gzip.compress(BY_TEXT)),
    "json of c4": ("c4-train.00000-of-01024.json.gz", gzip.compress(BY_TEXT)),
    "ndjson": ("a.ndjson", BY_TEXT),
    "no ending": ("corpus", BY_TEXT),
    "wrong ending": ("a.csv", BY_TEXT),
    "bz2": ("a.jsonl.bz2", bz2.compress(BY_TEXT)),
    "xz": ("a.jsonl.xz", lzma.compress(BY_TEXT)),
    "zstd without an ending": ("a.jsonl", zstd(BY_TEXT)),
    "array": ("a.jsonl", json.dumps(RECORDS).encode()),
    "pretty array": ("a.json", PRETTY),
    "pretty array as text": ("a.txt", PRETTY),
    "nested": ("a.json", json.dumps({"version": 1, "data": RECORDS}, indent=1).encode()),
    "nested on one line": ("a.json", json.dumps({"version": {}, "data": RECORDS}).encode()),
    "nested under any name": ("a.json", json.dumps({"mine": RECORDS}).encode()),
    "datasets server": (
        "a.json",
        json.dumps(
            {
                "features": [{"name": "text"}],
                "rows": [{"row_idx": i, "row": r} for i, r in enumerate(RECORDS)],
            }
        ).encode(),
    ),
    "concatenated": ("a.json", "".join(json.dumps(r, indent=1) for r in RECORDS).encode()),
    "concatenated on one line": ("a.jsonl", "".join(map(json.dumps, RECORDS)).encode()),
    "commas behind lines": ("a.jsonl", BY_TEXT.replace(b"}\n", b"},\n")),
    "columns of pandas": ("a.json", pd.DataFrame(RECORDS).to_json().encode()),
    "lists of columns": ("a.json", json.dumps({"text": TEXTS, "n": list(range(5))}).encode()),
    "texts": ("a.json", json.dumps(TEXTS).encode()),
    "lists of ids": ("a.json", json.dumps(IDS.tolist()).encode()),
    "lines of ids": ("a.jsonl", "\n".join(map(json.dumps, IDS.tolist())).encode()),
    "utf-16": ("a.jsonl", BY_TEXT.decode().encode("utf-16")),
    "utf-16 without a mark": ("a.jsonl", BY_TEXT.decode().encode("utf-16-be")),
    "utf-32": ("a.jsonl", BY_TEXT.decode().encode("utf-32")),
    "utf-16 text": ("a.txt", "\n\n".join(TEXTS).encode("utf-16-le")),
    "lines of a macintosh": ("a.txt", "\r\r".join(TEXTS).encode()),
    "tabs": ("a.tsv", csv_of(TEXTS).replace(b",", b"\t")),
    "tabs, called csv": ("a.csv", csv_of(TEXTS).replace(b",", b"\t")),
    "semicolons": ("a.csv", csv_of(TEXTS).replace(b",", b";")),
    "a spreadsheet's line": ("a.csv", b"sep=;\r\n" + csv_of(TEXTS).replace(b",", b";")),
    "csv, called text": ("a.txt", csv_of(TEXTS)),
    "names in capitals": ("a.csv", csv_of(TEXTS).replace(b"paragraph", b" Paragraph ")),
    "ids in csv": ("a.csv", pd.DataFrame({"ids": IDS.tolist()}).to_csv().encode()),
    "parquet of pandas": ("a.parquet.gzip", FORMATS["text.parquet"]),
    "arrow file": ("a.arrow", arrow_of(pa.ipc.new_file, text=TEXTS)),
    "arrow stream": ("a.arrow", arrow_of(pa.ipc.new_stream, ids=IDS.tolist())),
    "feather": ("a.feather", feather_of(pa.table({"text": TEXTS}))),
    "npz": ("a.npz", npz_of(anything=IDS.numpy())),
    "npz of a pair": ("a.npz", npz_of(suffix=HALVES["suffix"], prefix=HALVES["prefix"])),
    "npz of two arrays": ("a.npz", npz_of(arr_0=HALVES["prefix"], arr_1=HALVES["suffix"])),
    "npz with columns": (
        "a.npz",
        npz_of(input_ids=padded(0), attention_mask=padded(-1) >= 0, label=np.arange(5)),
    ),
    "ragged array, -1": ("a.npy", npy_of(padded(-1))),
    "ragged array, -100": ("a.npy", npy_of(padded(-100))),
    "ragged array, 0": ("a.npy", npy_of(padded(0))),
    "columns first": ("a.npy", npy_of(np.asfortranarray(IDS.numpy()))),
    "big endian": ("a.npy", npy_of(IDS.numpy().astype(">i4"))),
    "batch of a tokenizer": ("a.pt", pt_of({"input_ids": IDS, "attention_mask": IDS >= 0})),
    "list of tensors": ("a.pt", pt_of([row[: 24 - i % 2] for i, row in enumerate(IDS)])),
    "two tensors": ("a.pt", pt_of((IDS[:, :10], IDS[:, 10:]))),
    "duplicate columns": (
        "a.csv",
        b"text,n,n\n" + "".join(f"{t},1,2\n" for t in TEXTS).encode(),
    ),
    "empty rows": ("a.csv", csv_of(TEXTS).replace(b"\r\n", b"\r\n\r\n")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_ids(tmp_path, layout):
    name, content = LAYOUTS[layout]
    (tmp_path / name).write_bytes(content)
    paragraphs = mc.Paragraphs.read(tmp_path / name, zoo.tokenizer(), **LENGTHS)
    assert torch.equal(paragraphs.ids, IDS[:, :22])
    assert len(set(paragraphs.names)) == 5
    # In a folder, too: nothing but its content tells what a file is.
    if layout not in ("utf-16 text", "lines of a macintosh"):
        assert torch.equal(
            mc.Paragraphs.read(tmp_path, zoo.tokenizer(), **LENGTHS).ids, IDS[:, :22]
        )


def test_quotes_between_tabs(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(f'text\tn\n"{TEXTS[0]}\t1\n{TEXTS[1]}\t2\n')
    texts = [row["text"] for row in _records(path)]
    assert texts == ['"' + TEXTS[0], TEXTS[1]]  # a quote that does not close is a character
    path.write_text(f'text\tn\n"{TEXTS[0]}\t and a ""tab"""\t1\n')
    assert [row["text"] for row in _records(path)] == [f'{TEXTS[0]}\t and a "tab"']


def _records(path):
    from memcircuits.data.formats.delimited import read_csv

    return [record for _, record, _ in read_csv(find_sources(path)[0])]


def test_duplicate_columns_are_kept_under_names_of_their_own(tmp_path):
    (tmp_path / "a.csv").write_text("text,n,n\n<1> <2>,1,2\n")
    lengths = {"n_prefix": 1, "n_continuation": 1}
    paragraphs = mc.Paragraphs.read(tmp_path / "a.csv", zoo.tokenizer(), **lengths)
    assert paragraphs.metadata == {"n": (1,), "n.2": (2,)}
    table = pa.Table.from_arrays([pa.array(["<1> <2>"])] * 2, names=["text", "text"])
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    paragraphs = mc.Paragraphs.read(tmp_path / "a.arrow", zoo.tokenizer(), **lengths)
    assert paragraphs.metadata == {"text.2": ("<1> <2>",)}


NOT_READ = {
    "pdf": (b"%PDF-1.7 ...", "it is a PDF; extract its text"),
    "workbook": (None, "it is a document of an office program"),
    "zip": (None, "it is a zip archive; unpack it"),
    "tar": (b"\0" * 257 + b"ustar" + b"\0" * 250, "it is an archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
    "old workbook": (b"\xd0\xcf\x11\xe0" + b"\0" * 50, "office program"),
    "model": (b"GGUF\3\0\0\0", "it is a model"),
    "pictures": (b"\x89PNG\r\n\x1a\n\0\0", "its format is not known"),
}


@pytest.mark.parametrize("kind", NOT_READ)
@pytest.mark.parametrize("name", ["a", "a.txt", "a.jsonl"])
def test_what_holds_no_paragraphs_is_refused_by_its_name(tmp_path, kind, name):
    import zipfile

    content, says = NOT_READ[kind]
    if content is None:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("xl/workbook.xml" if kind == "workbook" else "a.csv", "text")
    else:
        (tmp_path / name).write_bytes(content)
    if kind == "pictures" and name != "a":
        says = "UTF-8"
    with pytest.raises(mc.InputError, match=says):
        mc.Paragraphs.read(tmp_path / name, zoo.tokenizer(), **LENGTHS)


def test_large_json_is_parsed_in_pieces(tmp_path):
    records = [{"text": " ".join(["<7>"] * 3000), "i": i} for i in range(300)]
    for name, document in (("a.json", records), ("b.json", {"meta": {}, "data": records})):
        (tmp_path / name).write_text(json.dumps(document, indent=1))
        paragraphs = mc.Paragraphs.read(tmp_path / name, zoo.tokenizer(), **LENGTHS)
        assert paragraphs.metadata["i"] == tuple(range(300))


def test_json_that_stops_is_read_up_to_there(tmp_path):
    from memcircuits.data.formats.sources import read_rows

    (tmp_path / "a.json").write_bytes(PRETTY[:-40])
    *rows, end = read_rows(find_sources(tmp_path / "a.json")[0])
    assert [row.name for row in rows] == ["d0", "d1", "d2", "d3"]
    assert (end.where, end.unread) == ("a.json, after row 4", True)


def test_a_first_line_that_is_damaged_costs_itself(tmp_path):
    from memcircuits.data.formats.sources import read_rows

    (tmp_path / "a.jsonl").write_bytes(BY_IDS[10:])
    rows = list(read_rows(find_sources(tmp_path / "a.jsonl")[0]))
    assert [hasattr(row, "reason") for row in rows] == [True, False, False, False, False]


def test_parquet_under_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(parquet_of(text=TEXTS))
    assert find_sources(tmp_path / "a.jsonl")[0].kind == "parquet"
    (tmp_path / "b.parquet").write_bytes(lines([{"text": TEXTS[0]}]))
    assert find_sources(tmp_path / "b.parquet")[0].kind == "jsonl"
