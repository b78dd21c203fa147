"""Scans to disk: the same rows as a scan in memory, whoever scans them and however often killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.commands.scan import _print_folder
from memcircuits.data.formats.listing import find_sources, list_files
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.models.registry import adapt
from tests.data.test_formats import FAULTS
from tests.helpers import corpus_job
from tests.helpers import models as zoo

pytestmark = pytest.mark.any_version

OPTIONS = {
    "windows": corpus_job.WINDOWS,
    "part_records": corpus_job.PART_RECORDS,
    "batch_size": 32,
    "progress": False,
}


FAULTS_OF_CONTENT = [
    fault
    for fault in FAULTS
    if fault not in ("missing", "unknown ending", "compressed parquet", "empty folder")
]


def parts_of(folder):
    """Everything that a scan wrote, byte by byte, but for the clock in `done`."""
    files = (Path(folder) / kind for kind in ("parts", "quarantine"))
    return {str(f.relative_to(folder)): f.read_bytes() for d in files for f in d.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    corpus_job.write_corpus(path, 100)
    return path


@pytest.fixture(scope="module")
def whole(corpus, neo):
    """The scan that nothing stopped."""
    return scan_to_disk(neo, corpus, corpus.parent / "whole", **OPTIONS)


def test_rows_equal_a_scan_in_memory(whole, neo):
    frame = whole.to_frame()
    assert len(frame) == 96 * 10
    assert len(whole.parts) == 13
    paragraphs = mc.Paragraphs.from_tokens(
        torch.tensor(np.stack(frame["ids"].tolist())), n_prefix=10, names=frame["id"].tolist()
    )
    result = mc.scan(neo, paragraphs, batch_size=32).to_frame()
    for column in ("em", "memorized", "bucket", "loose_match"):
        assert result[column].tolist() == frame[column].tolist()
    for column in ("nll", "log_prob", "margin", "min_k", "bits"):
        np.testing.assert_allclose(result[column], frame[column], atol=1e-4, rtol=1e-5)
    assert frame["id"].tolist()[:3] == ["d0", "d0@22", "d0@44"]
    assert frame["i"].tolist()[:11] == [0] * 10 + [1]
    rows = zoo.random_ids(100, 220, seed=3)
    assert frame["ids"][12].tolist() == rows[1, 44:66].tolist()


def test_the_longest_recitations_have_the_columns_of_a_scan_in_memory(whole, corpus, neo, tmp_path):
    assert list(whole.longest(3)) == ["id", "em", "nll", "text"]
    on_request = {"sampler": mc.Sampler(temperature=0.7), "near_verbatim": True}
    folder = scan_to_disk(neo, corpus, tmp_path / "out", **OPTIONS, **on_request)
    longest = folder.longest(5, neo)
    ids = torch.tensor(np.stack(folder.to_frame()["ids"].tolist()))
    names = folder.to_frame()["id"].tolist()
    paragraphs = mc.Paragraphs.from_tokens(ids, n_prefix=10, names=names)
    expected = mc.scan(neo, paragraphs, **on_request, progress=False).longest(5)
    assert list(longest) == list(expected) == ["id", "em", "nll", "samples", "similarity", "text"]
    assert longest["id"].tolist() == expected["id"].tolist()
    np.testing.assert_allclose(longest["samples"], expected["samples"], rtol=1e-3)
    np.testing.assert_allclose(longest["similarity"], expected["similarity"], rtol=1e-6)


def test_unusable_rows_are_kept_with_their_reasons(whole):
    bad = whole.quarantine()
    assert [row["where"] for row in bad] == [f"corpus.jsonl, line {n}" for n in (8, 10, 58, 60)]
    assert "not JSON" in bad[0]["reason"]
    assert "it has 5 tokens, 22 are needed" in bad[1]["reason"]
    summary = whole.summary
    assert (summary["rows"], summary["windows"], summary["quarantined"]) == (100, 960, 4)
    assert summary["tokens"] == 960 * 22
    assert summary["drifted"] == 0 < summary["drift_sampled"]
    assert whole.complete


def test_shards_write_the_same_parts(whole, corpus, neo, tmp_path):
    for index in (2, 0, 1):
        assert not (tmp_path / "manifest.json").is_file() or not ScanFolder.open(tmp_path).complete
        folder_result = scan_to_disk(neo, corpus, tmp_path, shard=(index, 3), **OPTIONS)
    assert folder_result.complete
    assert parts_of(tmp_path) == parts_of(whole.folder)
    assert folder_result.summary["windows"] == 960


def test_shards_of_many_files_take_whole_files(neo, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        corpus_job.write_corpus(tmp_path / "in" / f"{i}.jsonl", 20)
    whole = scan_to_disk(neo, tmp_path / "in", tmp_path / "whole", **OPTIONS)
    for index in range(2):
        folder_result = scan_to_disk(
            neo, tmp_path / "in", tmp_path / "two", shard=(index, 2), **OPTIONS
        )
        files = {path.name[:5] for path in folder_result.parts}
        assert files == ({"00000", "00002"} if index == 0 else {"00000", "00001", "00002"})
    assert parts_of(tmp_path / "two") == parts_of(whole.folder)


def test_killed_and_resumed_scans_lose_and_repeat_nothing(neo, tmp_path):
    """`kill -9` at random moments; the real thing (50,000 windows) is tests/benchmarks/kills.py."""
    source = tmp_path / "corpus.jsonl"
    corpus_job.write_corpus(source, 200)
    whole = scan_to_disk(neo, source, tmp_path / "whole", **OPTIONS)
    out = tmp_path / "killed"
    job = [sys.executable, "-m", "tests.helpers.corpus_job", str(source), str(out)]
    chance = random.Random(5)
    n_parts, there = len(whole.parts), []
    for kill in range(3):
        process = subprocess.Popen(job)
        until = (kill + chance.random()) * n_parts / 4
        while process.poll() is None and len(list((out / "parts").glob("0*"))) < until:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)  # 0: it was done before the last signal
        there.append(len(list((out / "parts").glob("0*"))))
    assert any(0 < n < n_parts for n in there)
    for left in ("parts/.00000-000001.parquet.left", "quarantine/.00000-000001.jsonl.left"):
        (out / left).write_bytes(b"half")
    folder_result = scan_to_disk(neo, source, out, resume=True, **OPTIONS)
    assert folder_result.complete
    assert parts_of(out) == parts_of(whole.folder)
    assert folder_result.to_frame().equals(whole.to_frame())


def test_a_damaged_part_is_written_again(whole, corpus, neo, tmp_path):
    scan_to_disk(neo, corpus, tmp_path, **OPTIONS)
    (tmp_path / "parts" / "00000-000003.parquet").write_bytes(b"PAR1 half of it")
    scan_to_disk(neo, corpus, tmp_path, resume=True, **OPTIONS)
    assert parts_of(tmp_path) == parts_of(whole.folder)


def test_what_is_done_is_not_done_again(whole, corpus, neo, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.parts}
    monkeypatch.setattr(adapt(neo), "run", lambda *_, **__: pytest.fail("nothing is left to do"))
    again = scan_to_disk(neo, corpus, whole.folder, resume=True, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in again.parts} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resume": False}, "resume it"),
        ({"windows": Windows(10, 11, stride=22)}, r"other n_continuation \(12 there, 11 here\)"),
        ({"part_records": 9}, r"other part_records \(\d+ there, 9 here\)"),
        ({"batch_size": 31}, "was begun with 32"),
        ({"model": "another seed"}, "other fingerprint"),
        ({"source": "another"}, "other sources"),
    ],
)
def test_another_scan_is_refused(whole, corpus, neo, tmp_path, change, says):
    model = zoo.bridge("gpt_neo", seed=1) if change.pop("model", None) else neo
    source = corpus
    if change.pop("source", None):
        source = tmp_path / "corpus.jsonl"
        source.write_bytes(corpus.read_bytes().replace(b"d99", b"d98"))
    with pytest.raises(mc.InputError, match=says):
        scan_to_disk(model, source, whole.folder, **{"resume": True, **OPTIONS, **change})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b'{"ids": [1, 2]}\n', "no window could be scanned; corpus.jsonl, line 1"),
        (b'{"body": 1}\n', "no window could be scanned"),
        (b'{"ids": [' + b"101, " * 30 + b"1]}\n", "another tokenizer"),
    ],
)
def test_corpora_without_a_window_are_refused(neo, tmp_path, content, says):
    (tmp_path / "corpus.jsonl").write_bytes(content)
    with pytest.raises(mc.InputError, match=says):
        scan_to_disk(neo, tmp_path / "corpus.jsonl", tmp_path / "out", **OPTIONS)


def test_damaged_files_among_good_ones_are_quarantined(neo, tmp_path):
    (tmp_path / "in").mkdir()
    corpus_job.write_corpus(tmp_path / "in" / "a.jsonl", 5)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1")
    (tmp_path / "in" / "c.csv").write_text("a,b\n1,2\n")
    folder_result = scan_to_disk(neo, tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert [row["where"] for row in folder_result.quarantine()] == ["b.parquet"]
    (passed_over,) = (note for note in folder_result.notes if "passed over" in note)
    assert passed_over.startswith("1 file was passed over: c.csv (its columns are a, b;")
    assert folder_result.summary["windows"] == 50


def test_a_line_too_long_to_be_a_document_is_quarantined(neo, tmp_path):
    """A gigabyte goes the same way, see test_formats.py."""
    source = tmp_path / "a.jsonl"
    corpus_job.write_corpus(source, 5)
    with source.open("r+b") as file:
        file.seek(2**25, os.SEEK_END)  # a hole: it takes no room on disk
        file.write(b"\n")
    folder_result = scan_to_disk(neo, source, tmp_path / "out", **OPTIONS)
    assert folder_result.summary["windows"] == 50
    assert [row["where"] for row in folder_result.quarantine()] == ["a.jsonl, line 6"]
    assert "longer than 16 MiB" in folder_result.quarantine()[0]["reason"]
    with pytest.raises(mc.InputError, match="line 6; longer than 16 MiB"):
        mc.Paragraphs.read(source, n_prefix=10, n_continuation=12)


@pytest.mark.parametrize("fault", FAULTS_OF_CONTENT)
def test_every_fault_of_a_file_is_an_error_or_quarantined(neo, tmp_path, fault):
    name, content, says = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    options = {**OPTIONS, "windows": Windows(10, 12)}
    says = "it is empty" if "is empty" in says else says
    try:
        folder_result = scan_to_disk(neo, tmp_path / name, tmp_path / "out", **options)
    except mc.InputError as error:
        reasons = str(error)
    else:
        reasons = str([f"{r['where']}; {r['reason']}" for r in folder_result.quarantine()])
    assert says in reasons


def test_all_faults_together_leave_the_good_rows_alone(neo, tmp_path):
    for i, fault in enumerate(FAULTS_OF_CONTENT):
        name, content, _ = FAULTS[fault]
        (tmp_path / "in" / f"{i:02d}").mkdir(parents=True)
        (tmp_path / "in" / f"{i:02d}" / name).write_bytes(content)
    corpus_job.write_corpus(tmp_path / "in" / "good.jsonl", 5)
    folder_result = scan_to_disk(neo, tmp_path / "in", tmp_path / "out", **OPTIONS)
    frame = folder_result.to_frame()
    assert (frame["file"] == "good.jsonl").sum() == 50
    named = {row["where"][:2] for row in folder_result.quarantine()}
    passed_over = {file.where[:2] for file in list_files(tmp_path / "in").passed_over}
    assert not named & passed_over
    assert len(named | passed_over) == len(FAULTS_OF_CONTENT)
    assert folder_result.summary["quarantined"] == len(folder_result.quarantine())


def test_the_content_of_every_kind_of_source_is_part_of_the_key(neo, tmp_path):
    datasets = pytest.importorskip("datasets")
    ids = zoo.random_ids(4, 22).numpy()

    def save(first):
        for half, columns in (("prefix", ids[:, :10]), ("suffix", ids[:, 10:] * first % 101)):
            np.save(tmp_path / f"x_{half}.npy", columns.astype(np.uint16))
        texts = [" ".join(f"<{i}>" for i in row * first % 101) for row in ids]
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")

    options = {**OPTIONS, "windows": Windows(10, 12)}
    sources = {"pair": tmp_path / "x_prefix.npy", "saved": tmp_path / "saved"}
    save(1)
    for name, source in sources.items():
        scan_to_disk(neo, source, tmp_path / name / "out", **options)
        scan_to_disk(neo, source, tmp_path / name / "out", resume=True, **options)
    save(2)
    for name, source in sources.items():
        with pytest.raises(mc.InputError, match="other sources"):
            scan_to_disk(neo, source, tmp_path / name / "out", resume=True, **options)


def test_filters_that_leave_nothing_are_named(neo, corpus, tmp_path):
    options = {**OPTIONS, "windows": Windows(10, 12, drop=("<",))}
    with pytest.raises(mc.InputError, match=r"96 left out \(keyword\)"):
        scan_to_disk(neo, corpus, tmp_path / "out", **options)


def test_windows_with_non_finite_numbers_are_quarantined(tmp_path):
    model = zoo.bridge("gpt_neo")
    with torch.no_grad():
        model.pos_embed.weight[15] = float("nan")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(f'{{"ids": {list(range(22))}, "id": "spoilt"}}\n')
    options = {**OPTIONS, "windows": Windows(10, 12)}
    with pytest.raises(mc.InputError, match="spoilt; its numbers are not finite"):
        scan_to_disk(model, corpus, tmp_path / "out", **options)


def test_duplicates_are_counted_over_the_whole_corpus(neo, tmp_path):
    row = zoo.random_ids(1, 22).tolist()[0]
    other = zoo.random_ids(1, 22, seed=2).tolist()[0]
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(f'{{"ids": {r}}}\n' for r in [row] * 11 + [other] + [row] * 3))
    windows = Windows(10, 12, deduplicate=True)
    folder_result = scan_to_disk(neo, source, tmp_path / "out", **{**OPTIONS, "windows": windows})
    frame = folder_result.to_frame()
    assert frame["duplicates"].tolist() == [14, 1]
    assert frame["ids"][0].tolist() == row
    assert folder_result.summary["left_out"] == {"duplicate": 12}
    assert any(list(trace.x) == [1, 14] for trace in folder_result.figure().data)


def test_counts_that_the_corpus_gives_are_the_duplication(neo, tmp_path):
    rows = zoo.random_ids(4, 22).tolist()
    given = [{"ids": ids, "duplicates": 2**i} for i, ids in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    options = {**OPTIONS, "windows": Windows(10, 12)}
    folder_result = scan_to_disk(neo, tmp_path / "a.jsonl", tmp_path / "out", **options)
    assert folder_result.to_frame()["duplicates"].tolist() == [1, 2, 4, 8]
    assert any(list(trace.x) == [1, 2, 4, 8] for trace in folder_result.figure().data)


def test_memorized_windows_are_paragraphs_again(neo, tmp_path):
    recited = zoo.mixed(neo)
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(f'{{"ids": {ids}}}\n' for ids in recited.ids.tolist()))
    windows = Windows(10, 12)
    folder_result = scan_to_disk(neo, source, tmp_path / "out", **{**OPTIONS, "windows": windows})
    assert torch.equal(folder_result.paragraphs().ids, recited.ids[:4])
    assert len(folder_result.paragraphs(min_em=0)) == 8
    again = mc.Paragraphs.read(folder_result.folder, n_prefix=10, n_continuation=12)
    assert torch.equal(again.ids, recited.ids)
    assert folder_result.summary["memorized"] == 4


def test_memory_stays_flat(neo, tmp_path):
    """Ten times the corpus takes no more memory; the figure for 100,000 is in the capacity page."""
    import tracemalloc

    peaks = []
    for rows in (50, 500):
        source = tmp_path / f"{rows}.jsonl"
        corpus_job.write_corpus(source, rows, length=44)
        tracemalloc.start()
        scan_to_disk(neo, source, tmp_path / f"out-{rows}", **OPTIONS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20


# -- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("model")
    zoo.hf_model("gpt_neo").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    lengths = ["--n-prefix", "10", "--n-continuation", "12"]
    return ["scan", "--model", str(folder), "--paragraphs", str(corpus), *lengths]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_command_scans_resumes_and_refuses(command, whole, tmp_path):
    corpus_options = ["--stride", 22, "--part-records", 8, "--batch-size", 32, "--json"]
    first = run(*command, *corpus_options, "--out", tmp_path / "out")
    assert first.exit_code == 0, first.output
    totals = json.loads(first.stdout)["values"]["totals"]
    assert (totals["windows"], totals["quarantined"]) == (960, 4)
    assert parts_of(tmp_path / "out") == parts_of(whole.folder)
    again = run(*command, *corpus_options, "--out", tmp_path / "out")
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    resumed = run(*command, *corpus_options, "--out", tmp_path / "out", "--resume")
    assert resumed.exit_code == 0
    assert json.loads(resumed.stdout)["values"]["totals"]["tokens_in_these_seconds"] == 0


def test_command_in_a_job_array_and_under_accelerate(command, tmp_path, monkeypatch):
    options = ["--stride", 22, "--part-records", 8, "--batch-size", 32, "--out", tmp_path / "out"]
    first = run(*command, *options, "--shard-index", 0, "--num-shards", 2)
    assert first.exit_code == 0, first.output
    assert "shard 0 of 2 is finished" in first.stdout
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    second = run(*command, *options)
    assert second.exit_code == 0, second.output
    assert "960 windows of 100 rows" in second.stdout
    assert "tokens/s" in second.stdout


def test_command_in_a_job_array_with_more_jobs_than_parts(command, tmp_path):
    """A job that has nothing to do says so, also when it is the first to run."""
    options = ["--part-records", 60, "--out", tmp_path / "out", "--num-shards", 3]
    for index in (2, 0, 1):
        outcome = run(*command, *options, "--shard-index", index)
        assert outcome.exit_code == 0, outcome.output
        assert ("0 windows of 0 rows" if index == 2 else " windows of ") in outcome.stdout
    assert "96 windows of 100 rows" in outcome.stdout


def test_a_folder_of_other_files_is_no_place_for_a_scan(neo, tmp_path):
    """From then on it would be read as that scan, without the files that were there."""
    corpus, texts = tmp_path / "corpus.jsonl", tmp_path / "texts"
    corpus_job.write_corpus(corpus, 4)
    texts.mkdir()
    (texts / "chapter.txt").write_text("<1> <2>")
    with pytest.raises(mc.InputError, match=r"texts holds chapter.txt and no scan; give a new or"):
        scan_to_disk(neo, corpus, texts, **OPTIONS)
    assert [path.name for path in texts.iterdir()] == ["chapter.txt"]
    (texts / "chapter.txt").unlink()
    (texts / ".hidden").touch()
    assert scan_to_disk(neo, corpus, texts, **OPTIONS).complete


@pytest.mark.slow
def test_processes_started_together_share_a_scan(command, whole, tmp_path):
    """`accelerate launch`, as on a machine with two GPUs: both write one folder at once."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "-m", "memcircuits"]
    options = ["--stride", 22, "--part-records", 8, "--batch-size", 32, "--out", tmp_path / "out"]
    job = [*launch, *command, *map(str, options), "--device", "cpu"]
    subprocess.run(job, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = ScanFolder.open(tmp_path / "out")
    assert result.complete
    assert {path.name for path in (tmp_path / "out" / "done").iterdir()} == {
        "0-of-2.json",
        "1-of-2.json",
    }
    assert parts_of(tmp_path / "out") == parts_of(whole.folder)


def test_a_shard_that_finishes_while_totals_are_read(whole, tmp_path, monkeypatch, capsys):
    """Totals of parts have no seconds; they are printed as those of an unfinished scan."""
    folder = ScanFolder.open(shutil.copytree(whole.folder, tmp_path / "out"))
    done = tmp_path / "out" / "done" / "0-of-1.json"
    away = done.rename(tmp_path / "away.json")
    totals = folder.summary
    assert "seconds" not in totals

    def and_finish(folder):
        if away.exists():
            away.rename(done)
        return totals

    monkeypatch.setattr(ScanFolder, "summary", property(and_finish))
    _print_folder(folder, (0, 2), 0, None)
    assert folder.complete
    assert "shard 0 of 2 is finished, others are not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--resume"], "--out"),
        (["--offset", "3"], "--out"),
        (["--out", "o", "--engine", "spark"], "is not one of 'local', 'ray'"),
        (["--out", "o", "--shard-index", "0"], "together"),
        (["--out", "o", "--shard-index", "2", "--num-shards", "2"], "0 to 1"),
        (["--out", "o", "--min-unique", "1.5"], "--min-unique: 1.5"),
    ],
)
def test_command_explains_what_is_wrong(command, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    result = run(*command, *options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr


def test_sources_are_named_without_the_machines_paths(whole):
    manifest = (whole.folder / "manifest.json").read_text()
    assert str(whole.folder.parent) not in manifest
    assert "corpus.jsonl" in manifest
    assert whole.manifest["versions"]["memcircuits"] == mc.__version__
    assert find_sources(whole.folder)[0].kind == "parquet"
