"""Spoiled files of saved results: each loads whole or is refused by one clear error."""

from __future__ import annotations

import random

import pytest

import memcircuits as mc
from memcircuits.results.result import Result
from tests.helpers.fuzz import COUNTS, only_input_errors, spoil
from tests.helpers.saved import FILES, RESULTS

pytestmark = pytest.mark.any_version


@pytest.mark.parametrize("name", FILES)
def test_spoiled_results(results, tmp_path, name):
    raw = (results / f"{name}.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path = tmp_path / "spoiled.safetensors"
    load = mc.UnigramTable.read if name == "UnigramTable" else Result.load
    draw = random.Random(name)
    own_type = type(load(results / f"{name}.safetensors"))
    refused = 0
    for turn in range(COUNTS["spoiled results"]):
        # Half of them keep the length and the data and spoil only the header's text.
        text = spoil(raw[8:end], draw)
        kept = len(text).to_bytes(8, "little") + text + raw[end:]
        spoiled = kept if turn % 2 else spoil(raw, draw)
        path.write_bytes(spoiled)
        loaded = None
        with only_input_errors("spoiled results", (name, spoiled[:1500])):
            loaded = load(path)
        assert path.read_bytes() == spoiled
        assert loaded is None or type(loaded) is own_type
        refused += loaded is None
    assert refused > COUNTS["spoiled results"] / 2


@pytest.mark.parametrize("name", RESULTS)
def test_provenance_says_what_a_result_came_from(results, name):
    """Weights, paragraphs, options (the seed, where there is one) and versions."""
    provenance = Result.load(results / f"{name}.safetensors").provenance
    assert len(provenance.model["fingerprint"]) == 16
    assert {"name", "class", "architecture", "basis", "dtype", "device"} <= set(provenance.model)
    assert all(len(group["hash"]) >= 8 for group in provenance.paragraphs.values())
    assert provenance.paragraphs
    assert isinstance(provenance.options, dict)
    assert {"memcircuits", "transformer-lens", "torch", "transformers"} <= set(provenance.versions)
