"""The shapes written in signatures are the shapes that occur."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_annotated_shapes_hold_in_every_analysis(name):
    found = subprocess.run(
        [sys.executable, "-m", "tests.helpers.shapes", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip().endswith("checked")
