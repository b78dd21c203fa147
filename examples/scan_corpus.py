"""What does the organism recite of a corpus? Run: python examples/scan_corpus.py

Writes a small corpus, begins to scan it to disk, kills that scan, resumes it, scans once more in
three shards, prints what was found and writes duplication.html. Half a minute on two cores.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import memcircuits as mc
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.measure.recitation_statistics import by_repetitions

PART_RECORDS, BATCH_SIZE = 8, 32


def write_corpus(folder: Path) -> None:
    """A quarter of the shipped paragraphs in two compressed files, and two rows that are bad."""
    shipped = mc.Paragraphs.shipped()[::4]
    rows = [
        json.dumps({"id": name, "ids": ids, "repetitions": repetitions})
        for name, ids, repetitions in zip(
            shipped.names, shipped.ids.tolist(), shipped.metadata["repetitions"], strict=True
        )
    ]
    rows.insert(5, '{"id": "short", "ids": [1, 2, 3]}')
    rows.insert(9, '{"id": "trunca')
    for i, piece in enumerate((rows[::2], rows[1::2])):
        with gzip.open(folder / f"{i}.jsonl.gz", "wt") as file:
            file.writelines(f"{row}\n" for row in piece)


def begin_and_kill(corpus: Path, out: Path) -> int:
    """Start the command, kill it when three parts are there; how many there are then."""
    command = [sys.executable, "-m", "memcircuits", "scan", "--paragraphs", str(corpus)]
    command += ["--part-records", str(PART_RECORDS), "--batch-size", str(BATCH_SIZE)]
    scan = subprocess.Popen([*command, "--device", "cpu", "--quiet", "--out", str(out)])
    while scan.poll() is None and len(list(out.glob("parts/0*"))) < 3:
        time.sleep(0.01)
    scan.kill()
    scan.wait()
    return len(list(out.glob("parts/0*")))


def main(folder: Path, figure: Path = Path("duplication.html")) -> None:
    corpus, out = folder / "corpus", folder / "scan"
    corpus.mkdir()
    write_corpus(corpus)
    done = begin_and_kill(corpus, out)

    model = mc.load_model(device="cpu")
    options = {"part_records": PART_RECORDS, "batch_size": BATCH_SIZE, "progress": False}
    scanned = scan_to_disk(model, corpus, out, resume=True, **options)
    print(f"killed with {done} parts there, resumed: {len(scanned.parts)} parts, {scanned.summary}")
    for row in scanned.quarantine():
        print(f"unusable: {row['where']}: {row['reason']}")

    for index in range(3):
        shards = scan_to_disk(model, corpus, folder / "shards", shard=(index, 3), **options)
    frame = scanned.to_frame()
    print("three shards give the same rows:", shards.to_frame().equals(frame))

    print(by_repetitions(frame).round(3).to_string(index=False))
    best = frame.sort_values("nll").head(5)
    print(best[["id", "em", "bits", "samples", "min_k", "bucket"]].round(3).to_string(index=False))
    scanned.figure().write_html(figure)
    print(f"wrote {figure}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
