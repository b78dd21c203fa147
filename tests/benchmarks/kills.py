"""`kill -9` a scan of the shipped organism at random moments; nothing may be lost or there twice.

    python -m tests.benchmarks.kills --windows 50000 --kills 20 --length 40

A corpus of random tokens is scanned once without a stop and once killed and resumed again and
again. A kill waits until a random number of parts is there and then for a random share of the time
that a part takes, so that it meets the scan while it starts, reads, computes or writes. Every file
of the two results must be the same, byte by byte, and no row there twice. The result is added to
docs/capacity.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.capacity import PAGE, record


def write_corpus(path: Path, windows: int, length: int, d_vocab: int, seed: int = 0) -> None:
    """Documents of ten windows each, in JSON lines; every 97th is unusable."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for i in range(windows // 10):
            ids = torch.randint(d_vocab, (10 * length,), generator=generator).tolist()
            file.write(json.dumps({"id": f"d{i}", "ids": ids}) + "\n")
            if i % 97 == 0:
                file.write("nonsense\n")


def scan(source: Path, out: Path, length: int, part_records: int) -> list[str]:
    """The command that is killed."""
    return [
        *(sys.executable, "-m", "memcircuits", "scan", "--paragraphs", str(source)),
        *("--n-prefix", str(length // 2), "--n-continuation", str(length - length // 2)),
        *("--stride", str(length), "--part-records", str(part_records), "--batch-size", "64"),
        *("--device", "cpu", "--quiet", "--resume", "--out", str(out)),
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """What the two scans must agree in: everything but the clock."""
    kinds = (folder / "parts", folder / "quarantine")
    files = {f"{k.name}/{f.name}": f.read_bytes() for k in kinds for f in k.iterdir()}
    return files | {"manifest.json": (folder / "manifest.json").read_bytes()}


def main() -> None:
    """Run both scans and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--length", type=int, default=100, help="tokens of a window")
    parser.add_argument("--part-records", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    chance = random.Random(given.seed)

    from memcircuits.measure.corpus.folder import ScanFolder
    from memcircuits.organism import DATA

    d_vocab = json.loads((DATA / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "corpus.jsonl"
        write_corpus(source, given.windows, given.length, d_vocab)
        started = time.perf_counter()
        whole = scan(source, folder / "whole", given.length, given.part_records)
        subprocess.run(whole, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - started
        n_parts = len(list((folder / "whole" / "parts").iterdir()))
        print(f"uninterrupted: {seconds:.0f} s", flush=True)

        killed = scan(source, folder / "killed", given.length, given.part_records)
        parts = folder / "killed" / "parts"
        half_written = 0
        for at in sorted(chance.uniform(0, n_parts - 3) for _ in range(given.kills)):
            process = subprocess.Popen(killed, stdout=subprocess.DEVNULL)
            while process.poll() is None and len(list(parts.glob("[0-9]*"))) < at:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, seconds / n_parts))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
            half_written += len(list(parts.glob(".*")))
            done = len(list(parts.glob("[0-9]*")))
            print(f"killed with {done} of {n_parts} parts there", flush=True)
        subprocess.run(killed, check=True, stdout=sys.stderr)
        one, two = files_of(folder / "whole"), files_of(folder / "killed")
        differing = sorted(
            name for name in one.keys() | two.keys() if one.get(name) != two.get(name)
        )
        if differing:
            print(f"{len(differing)} files differ, the first is {differing[0]}")
        rows = ScanFolder.open(folder / "killed").to_frame()
        expected = ScanFolder.open(folder / "whole").to_frame()
        once = not rows.duplicated(["file", "row", "start"]).any()
        same = not differing and rows.equals(expected) and once and not list(parts.glob(".*"))
        record(
            given.page,
            kills={
                "kills": given.kills,
                "windows": given.windows,
                "length": given.length,
                "rows": len(rows),
                "parts": n_parts,
                "quarantined": ScanFolder.open(folder / "killed").summary["quarantined"],
                "half_written": half_written,
                "same": same,
            },
        )
        print(f"temporary files left by kills and removed: {half_written}")
        print("the results are the same" if same else "THE RESULTS DIFFER")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
