"""Saved results: every kind is found, files of earlier versions are read, damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import memcircuits as mc
from memcircuits.base.io import read_safetensors
from memcircuits.measure.scanning import Scan
from memcircuits.results.provenance import Provenance, same_basis, sha256_of
from memcircuits.results.result import MODULE_OF_KIND, Result
from memcircuits.results.score_map import ScoreMap, largest
from tests.helpers.results import result_types

# Written by the version in which `Paragraphs.metadata` was called `facts`.
SCAN_WITH_FACTS = Path(__file__).with_name("scan_with_facts.safetensors")


def test_loading_knows_the_module_of_every_kind():
    defined_in = {kind: cls.__module__ for kind, cls in result_types().items()}
    assert defined_in == {kind: f"memcircuits.{name}" for kind, name in MODULE_OF_KIND.items()}


def test_a_scan_with_the_former_name_of_its_metadata_is_read(tmp_path):
    _, header = read_safetensors(SCAN_WITH_FACTS)
    assert "facts" in json.loads(header["fields"])
    scan = Scan.load(SCAN_WITH_FACTS)
    assert scan.paragraphs.metadata == {"repetitions": (256, 0)}
    assert scan.names == ("recited", "random")
    again = Scan.load(scan.save(tmp_path / "scan.safetensors"))
    assert again.paragraphs.metadata == scan.paragraphs.metadata
    assert torch.equal(again.token_log_prob, scan.token_log_prob)


def saved_with(provenance: object, path: Path) -> Path:
    """A saved `ScoreMap` whose header holds this as its provenance."""
    fields = {"name": "x", "units": "nats", "samples": {}, "notes": [], "axis": "head"}
    text = json.dumps(fields | {"provenance": provenance})
    tensors = {"values": torch.zeros(2, 3)}
    header = {"schema": "memcircuits.score-map/1", "fields": text}
    save_file(tensors, path, metadata=header | {"sha256": sha256_of(text, tensors)})
    return path


WHOLE = {"model": {"basis": "raw"}, "paragraphs": {}, "options": {}, "versions": {"torch": "2"}}


@pytest.mark.parametrize(
    ("provenance", "part"),
    [
        pytest.param([], "provenance: ", id="a list"),
        pytest.param({"model": {}}, "provenance.paragraphs: ", id="parts missing"),
        pytest.param(WHOLE | {"model": 3}, "provenance.model: ", id="a number for the model"),
        pytest.param(WHOLE | {"versions": {"torch": 2}}, "versions.torch: ", id="a number"),
        pytest.param(WHOLE | {"user": "me"}, "provenance.user: ", id="an unknown part"),
    ],
)
def test_a_malformed_provenance_is_named_in_one_line(tmp_path, provenance, part):
    with pytest.raises(mc.InputError) as caught:
        Result.load(saved_with(provenance, tmp_path / "map.safetensors"))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_declared_as_tuples_are_tuples(tmp_path):
    score_map = ScoreMap.load(saved_with(WHOLE, tmp_path / "map.safetensors"))
    assert score_map.notes == ()
    assert score_map.provenance == Provenance(**WHOLE)


def test_largest_orders_finite_values_and_ties_by_layer_and_head():
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([[1.0, nan, 3.0], [3.0, -inf, 2.0]])
    assert [str(head) for head in largest(values, 3)] == ["L0H2", "L1H0", "L1H2"]
    assert len(largest(values, 10)) == 4


def test_results_of_two_bases_are_not_compared():
    raw, folded = (Provenance({"basis": basis}, {}, {}, {}) for basis in ("raw", "folded"))
    same_basis("other", raw, raw)
    with pytest.raises(mc.InputError, match="measured in the folded basis"):
        same_basis("other", raw, folded)
