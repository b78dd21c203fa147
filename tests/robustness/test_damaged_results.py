"""Saved results and weights that are damaged, or say what is not so, are refused."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.base.io import read_safetensors
from memcircuits.measure.scanning import Scan
from memcircuits.models.loading import load_model
from memcircuits.results.result import Result
from tests.helpers.saved import RESULTS

pytestmark = pytest.mark.any_version

SOME = ("Scan", "ScoreMap", "ParameterGradients", "Ranking")


@pytest.mark.parametrize("name", SOME)
def test_saved_results_come_back(results, tmp_path, name):
    saved = results / f"{name}.safetensors"
    again = Result.load(saved).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == saved.read_bytes()


def test_every_kind_is_read_by_a_program_that_has_made_none(results):
    """Reading imports what the file holds; nothing else has to be imported first."""
    program = (
        "import sys\n"
        "from memcircuits.results.result import Result\n"
        "assert not Result.types\n"
        "for path in sys.argv[1:]: Result.load(path)\n"
    )
    files = [str(results / f"{name}.safetensors") for name in RESULTS]
    subprocess.run([sys.executable, "-c", program, *files], check=True)


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def packed(header: object, data: bytes) -> bytes:
    """A safetensors file of this header and data."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lies(raw: bytes) -> Iterator[bytes]:
    """Headers that promise what the data does not hold."""
    header, data = parts(raw)
    size = len(raw) - len(data) - 8
    name = next(key for key in header if key != "__metadata__")
    entry = header[name]
    yield struct.pack("<Q", 2**60) + raw[8:]
    yield struct.pack("<Q", size - 1) + raw[8:]
    yield packed([], data)
    yield packed({}, data)
    yield packed(header | {name: entry | {"shape": [2**40]}}, data)
    yield packed(header | {name: entry | {"shape": [-1]}}, data)
    yield packed(header | {name: entry | {"dtype": "F7"}}, data)
    yield packed(header | {name: entry | {"data_offsets": [0, 2**50]}}, data)
    yield packed(header | {name: entry | {"data_offsets": [8, 0]}}, data)
    yield packed({key: value for key, value in header.items() if key != name}, data)


def lies_about_fields(raw: bytes) -> Iterator[bytes]:
    """Whole tensors, and a header from which no result can be made."""
    header, data = parts(raw)
    yield packed(header | {"__metadata__": {}}, data)
    for fields in ("{", "[1]", "{}"):
        metadata = {"schema": "memcircuits.scan/1", "fields": fields}
        yield packed(header | {"__metadata__": metadata}, data)


@pytest.mark.parametrize("name", [*SOME, "UnigramTable"])
def test_damaged_results_are_refused(results, tmp_path, name):
    raw = (results / f"{name}.safetensors").read_bytes()
    draw = random.Random(0)
    cuts = [raw[: draw.randrange(len(raw))] for _ in range(10)]
    path = tmp_path / "damaged.safetensors"
    read = mc.UnigramTable.read if name == "UnigramTable" else Result.load
    for damaged in [b"", b"\0" * 8, *cuts, *lies(raw), *lies_about_fields(raw)]:
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged\.safetensors"):
            read(path)


def test_a_flipped_number_is_noticed(results, tmp_path):
    """And a result that was saved before there were checksums is read."""
    path = tmp_path / "damaged.safetensors"
    raw = bytearray((results / "Ranking.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + length])["score"]["data_offsets"]
    raw[8 + length + start + 2] ^= 16
    path.write_bytes(raw)
    with pytest.raises(InputError, match="its content is not what was written"):
        Result.load(path)
    tensors, header = read_safetensors(results / "Ranking.safetensors")
    del header["sha256"]
    save_file(tensors, path, metadata=header)
    assert torch.equal(Result.load(path).score, Result.load(results / "Ranking.safetensors").score)


def test_damaged_weights_are_refused(original, tmp_path):
    folder = Path(shutil.copytree(original / "model", tmp_path / "model"))
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for damaged in (b"", raw[:100], raw[: len(raw) // 2], *lies(raw)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^model: model; "):
            load_model(folder)


@pytest.mark.parametrize("schema", ["0", "2", "99", "", "1.0", "x", "1/1"])
def test_results_of_another_schema_are_refused(results, tmp_path, schema):
    tensors, header = read_safetensors(results / "Ranking.safetensors")
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=header | {"schema": f"memcircuits.ranking/{schema}"})
    with pytest.raises(InputError, match=r"^path: other\.safetensors; its schema is .*recompute"):
        Result.load(path)


def test_results_of_another_kind_are_refused(results):
    with pytest.raises(InputError, match="it holds no Scan"):
        Scan.load(results / "ScoreMap.safetensors")
    with pytest.raises(InputError, match="it holds no Result"):
        Result.load(results / "UnigramTable.safetensors")
    with pytest.raises(InputError, match="there is no such file"):
        Result.load(results / "missing.safetensors")
