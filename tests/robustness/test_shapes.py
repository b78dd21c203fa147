"""The shapes written in signatures are the shapes that occur."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.any_version


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_annotated_shapes_hold_in_every_analysis(name):
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.helpers.shapes", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.strip().endswith("checked")
