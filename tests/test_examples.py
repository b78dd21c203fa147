"""Every example runs as a script, in a folder of its own, and writes what it says."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
# Run by tests/models/test_smollm2.py and tests/browser/test_notebooks.py.
ELSEWHERE = {"bring_your_own_model", "quickstart"}
OPTIONS = {"reproduce_paper": ["--max-paragraphs", "3", "--edits", "1"]}  # 6 and 2 take longer
WRITTEN = {
    "anatomy": ["anatomy.html"],
    "scan_corpus": ["duplication.html"],
    "reproduce_paper": ["reproduction/reproduction.html", "reproduction/reproduction.json"],
}
PRINTED = {
    "ray_scan": "the same paragraphs and EM without Ray: True",
    "scan_corpus": "three shards give the same rows: True",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem not in ELSEWHERE]
)
def test_an_example_runs(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *OPTIONS.get(name, [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert PRINTED.get(name, "") in done.stdout
    for file in WRITTEN.get(name, []):
        assert (tmp_path / file).stat().st_size > 0, file
