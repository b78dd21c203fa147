"""What a scan costs: `python -m tests.benchmarks.capacity` measures and writes docs/capacity.md.

The scan is the one of `memcircuits scan --out`: reading, cutting, measuring, writing. Tokens per
second are those of whole windows. Memory is what the process holds after each tenth of the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

PAGE = Path(__file__).parents[2] / "docs" / "capacity.md"
LENGTH = 100
PILE_TOKENS = 300e9  # Biderman et al. 2023: the Pile in tokens of the Pythia tokenizer
GPU_FLOPS = 312e12  # an A100's bf16 matrix products, by its maker
GPU_SHARE = 0.2  # assumed, not measured
GPUS = (1, 8, 64)


def write_corpus(path: Path, windows: int, d_vocab: int) -> None:
    """Documents of ten windows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for i in range(windows // 10):
            ids = torch.randint(1, d_vocab, (10 * LENGTH,), generator=generator).tolist()
            file.write(json.dumps({"id": i, "ids": ids}) + "\n")


def measure(name: str, windows: int, folder: Path) -> dict[str, Any]:
    """Scan a corpus of random tokens and watch the process's memory."""
    from memcircuits.adapter import adapt
    from memcircuits.corpus_scan import scan_to_disk
    from memcircuits.formats import find_sources, read_chunks
    from memcircuits.readers import Windows

    from .subjects import subject

    model = subject(name, 2).bridge
    adapter = adapt(model)
    write_corpus(folder / "corpus.jsonl", windows, adapter.d_vocab)
    write_corpus(folder / "first.jsonl", 20, adapter.d_vocab)
    options: dict[str, Any] = {"windows": Windows(stride=LENGTH), "progress": False}
    scan_to_disk(model, folder / "first.jsonl", folder / "first", **options)

    resident: list[float] = []
    out = folder / "out"
    n_parts = sum(1 for _ in read_chunks(find_sources(folder / "corpus.jsonl")[0], 100))
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            done = len(list((out / "parts").glob("0*")))
            if len(resident) < 9 and done * 10 >= (len(resident) + 1) * n_parts:
                resident.append(mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    found = scan_to_disk(model, folder / "corpus.jsonl", out, part_records=100, **options)
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    resident.append(mib())
    size = sum(part.stat().st_size for part in found.parts)
    weights = sum(p.numel() for p in model.original_model.parameters())
    cfg = model.cfg
    embedded = cfg.d_model * (cfg.d_vocab + cfg.n_ctx)
    per_token = 2 * (weights - embedded) + 2 * cfg.d_model * cfg.d_vocab * 50 / LENGTH
    per_token += 4 * cfg.n_layers * cfg.d_model * LENGTH
    return {
        "name": name,
        "parameters": weights,
        "windows": found.summary["windows"],
        "tokens_per_second": windows * LENGTH / seconds,
        "flop_per_token": per_token,
        "bytes_per_window": size / windows,
        "resident_mib": [round(x) for x in resident],
        "batch_size": found.manifest["batch_size"],
    }


def mib() -> float:
    """Memory that the process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def page(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """docs/capacity.md."""
    from .page import table

    speeds = table(
        ["model", "parameters", "windows", "tokens/s", "GFLOP/token", "GFLOP/s", "bytes/window"],
        (
            [
                row["name"],
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['windows']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flop_per_token'] / 1e9:.3f}",
                f"{row['tokens_per_second'] * row['flop_per_token'] / 1e9:.0f}",
                f"{row['bytes_per_window']:.0f}",
            ]
            for row in rows
        ),
    )
    longest = max(rows, key=lambda row: row["windows"])
    memory = ", ".join(map(str, longest["resident_mib"]))
    big = rows[-1]
    rate = GPU_FLOPS * GPU_SHARE / big["flop_per_token"]
    costs = table(
        ["GPUs", "tokens/s", "hours", "GPU hours"],
        (
            [
                str(n),
                f"{rate * n:,.0f}",
                f"{PILE_TOKENS / rate / n / 3600:,.1f}",
                f"{PILE_TOKENS / rate / 3600:,.0f}",
            ]
            for n in GPUS
        ),
    )
    here = PILE_TOKENS / big["tokens_per_second"] / 86400
    terabytes = PILE_TOKENS / LENGTH * big["bytes_per_window"] / 1e12
    return f"""# Capacity

What `memcircuits scan --out` costs. Written by `python -m tests.benchmarks.capacity`.

## Measured

{machine["processor"]}, {machine["threads"]} threads, fp32; a large matrix product runs at
{machine["matrix_product_gflops"]:.0f} GFLOP/s there. Windows of 50 + 50 random tokens, read from
JSON lines of token ids, everything from file to file.

{speeds}

Memory that the process held after each tenth of {longest["windows"]:,} windows, in MiB: {memory}.

The arithmetic of a token: 2 FLOP per weight outside the embeddings, 4 x layers x d_model x
{LENGTH} for attention, and the unembedding at the 50 positions of a window that predict the
continuation.

## Calculated: a corpus of the Pile's size

No GPU was at hand: this is arithmetic, not measurement. It takes {PILE_TOKENS / 1e9:.0f} billion
tokens in windows that do not overlap, a model of {big["flop_per_token"] / 1e9:.3f} GFLOP per token
(GPT-Neo 125M), and GPUs that sustain {GPU_SHARE:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s (an A100's
bf16 peak; the share is an assumption):

    tokens/s of a GPU = {GPU_SHARE} x {GPU_FLOPS:.3g} / {big["flop_per_token"]:.3g} = {rate:,.0f}
    hours             = {PILE_TOKENS:.3g} / (tokens/s x GPUs) / 3600

{costs}

On the machine above the same scan would take {here:,.0f} days. The parts would take
{terabytes:.1f} TB. Replace the rate by your own: every scan prints its tokens/s, and a scan of one
file is enough to know it. Larger models scale with their GFLOP per token.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.capacity", description=__doc__
    )
    parser.add_argument("--windows", type=int, default=100_000, help="of the organism")
    parser.add_argument("--windows-125m", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.job[0], int(given.job[1]), Path(folder))))
        return
    from .__main__ import machine

    rows = []
    for job in (("organism", given.windows), ("random-125m", given.windows_125m)):
        command = [sys.executable, "-m", "tests.benchmarks.capacity", "--job", *map(str, job)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    given.out.write_text(page(machine(quick=False), rows), encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
