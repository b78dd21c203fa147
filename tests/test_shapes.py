"""The shapes written in signatures are the shapes that occur."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_annotated_shapes_hold_in_every_analysis(name):
    script = Path(__file__).with_name("shapes.py")
    found = subprocess.run(
        [sys.executable, str(script), name], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip().endswith("checked")
