"""Ray writes the same parts and counts the same tokens, also when its workers are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.corpus.scan import scan_to_disk
from tests.helpers import corpus_job
from tests.helpers import models as zoo
from tests.helpers.local_ray import local_ray
from tests.measure.test_scan_to_disk import OPTIONS, parts_of

pytestmark = pytest.mark.any_version

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    with local_ray():
        yield


class Load:
    """Makes the model, and leaves the process's id in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        (self.folder / str(os.getpid())).touch()
        return corpus_job.load()


def test_ray_equals_local_although_a_worker_is_killed(neo, tmp_path):
    from memcircuits.measure.corpus.on_ray import scan_with_ray

    (tmp_path / "in").mkdir()
    for i in range(2):
        corpus_job.write_corpus(tmp_path / "in" / f"{i}.jsonl", 60)
    whole = scan_to_disk(neo, tmp_path / "in", tmp_path / "local", **OPTIONS)
    (tmp_path / "pids").mkdir()
    out, killed = tmp_path / "ray", []

    def kill():
        while len(list((out / "parts").glob("0*"))) < 3:
            time.sleep(0.005)
        workers = {int(file.name) for file in (tmp_path / "pids").iterdir()} - {os.getpid()}
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    scanned = scan_with_ray(Load(tmp_path / "pids"), tmp_path / "in", out, workers=1, **OPTIONS)
    killer.join()
    assert killed
    assert scanned.complete
    assert parts_of(out) == parts_of(whole.folder)
    assert scanned.summary["windows"] == whole.summary["windows"]
    assert len(list((tmp_path / "pids").iterdir())) >= 3  # here, the worker, and its successor

    (out / "parts" / "00001-000002.parquet").unlink()
    again = scan_with_ray(
        Load(tmp_path / "pids"), tmp_path / "in", out, workers=2, resume=True, **OPTIONS
    )
    assert parts_of(out) == parts_of(whole.folder)
    assert again.summary["tokens_in_these_seconds"] == 8 * 10 * 22


def test_the_command_on_a_cluster_writes_the_same_parts(tmp_path):
    """`--ray-address`, in a process of its own: it joins the Ray that these tests started."""
    corpus_job.write_corpus(tmp_path / "corpus.jsonl", 30)
    model = zoo.save("gpt_neo", tmp_path / "model")
    options = {"n-prefix": 10, "n-continuation": 12, "stride": 22, "part-records": 8}
    options |= {"model": model, "paragraphs": tmp_path / "corpus.jsonl", "batch-size": 32}
    options |= {"bos": "yes"}
    job = ["scan", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
    local = CliRunner().invoke(app, [*job, "--quiet", "--out", str(tmp_path / "local")])
    assert local.exit_code == 0, local.output
    job += ["--engine", "ray", "--ray-address", ray.get_runtime_context().gcs_address]
    command = [sys.executable, "-m", "memcircuits", *job, "--out", str(tmp_path / "ray")]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "280 windows of 30 rows" in outcome.stdout
    assert parts_of(tmp_path / "ray") == parts_of(tmp_path / "local")
    assert ScanFolder.open(tmp_path / "ray").manifest["bos"] == [0]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:99999", "ray://[::1]:1"])
def test_a_cluster_that_is_not_there_is_said_at_once(address, tmp_path):
    from memcircuits.measure.corpus.on_ray import count_with_ray

    (tmp_path / "a.txt").write_text("<1>")
    with pytest.raises(mc.InputError, match="no cluster was reached"):
        count_with_ray(tmp_path / "a.txt", zoo.tokenizer(), address=address)


def test_ray_counts_the_same_tokens(tmp_path):
    from memcircuits.measure.corpus.on_ray import count_with_ray

    for i in range(3):
        words = " ".join(f"<{j}>" for j in zoo.random_ids(1, 500, seed=i)[0].tolist())
        (tmp_path / f"{i}.txt").write_text(words)
    local = mc.UnigramTable.from_corpus(tmp_path, zoo.tokenizer())
    result = count_with_ray(tmp_path, zoo.tokenizer(), progress=False)
    assert torch.equal(result.counts, local.counts)
    assert (result.source, result.tokenizer) == (local.source, local.tokenizer)


def test_what_a_worker_finds_wrong_is_said(neo, tmp_path):
    from memcircuits.measure.corpus.on_ray import scan_with_ray

    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2]}\n')
    with pytest.raises(mc.InputError, match="it has 2 tokens"):
        scan_with_ray(corpus_job.load, tmp_path / "a.jsonl", tmp_path / "out", **OPTIONS)
